"""ProSeCo's corrector: between two unmasks the model reads its own full draft until it agrees (arXiv 2602.11590).

    Corrector(every=2, passes=4)                     in blocks, as for LLaDA
    Corrector(every=2, passes=4, counts="text")      whole texts, with `unmask: Bernoulli`, as for MDLM

The same network is a denoiser where it sees masks and a corrector where it sees none. A corrector step fills every
mask with the best guess and runs the network on that draft up to `passes` times, each time changing the draft by what
it says. Visible tokens take the last draft, and masks are unmasked by the last logits.

Forward calls: at most T + floor(T / every) * passes for T steps. No call is made for tokens whose logits are known: a
network that is told no time says the same again. So a text without masks (post steps) needs none for its first pass,
and a draft that stays as it is needs no other. Guidance holds for corrections as well, at two calls a pass; the
released code drops it there, so that its scale has no effect where every step corrects.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from src.io.errors import UserError
from src.samplers.reviser import Corrected, Predict, Prediction, Reviser, State
from src.samplers.schedule import Schedule
from src.samplers.unmask import draw, top

SCOPES = ("written", "block")
PICKS = ("argmax", "sample", "edit")
COUNTS = ("block", "text")


class Corrector(Reviser):
    """Every `every`-th step corrects; post steps do as well.

    passes: the most forward calls of one correction; 0 never corrects
    scope:  `written` corrects the current block and all before it, `block` the current one alone
    pick:   how a pass changes the draft. `argmax`: takes the best tokens. `sample`: draws from the probabilities, at
            temperature 1. `edit`: takes the best tokens at the `num_edits` places where they differ and are most sure
    counts: steps are counted from 1 in each `block`, as released for LLaDA, or over the whole `text`
    begin:  the first step, of those so counted, that may correct
    """

    def __init__(
        self,
        *,
        every: int = 1,
        passes: int = 1,
        scope: Literal["written", "block"] = "written",
        pick: Literal["argmax", "sample", "edit"] = "argmax",
        num_edits: int | None = None,
        counts: Literal["block", "text"] = "block",
        begin: int = 1,
    ) -> None:
        if every < 1 or passes < 0 or begin < 1:
            raise UserError(f"every and begin are at least 1 and passes at least 0, got {every}, {begin}, {passes}")
        for value, known in ((scope, SCOPES), (pick, PICKS), (counts, COUNTS)):
            if value not in known:
                raise UserError(f"expected one of {known}, got {value!r}")
        if (num_edits is not None) != (pick == "edit") or (num_edits is not None and num_edits < 1):
            raise UserError(f"num_edits is a number of at least 1 for pick=edit and null else, got {num_edits}")
        self.every, self.passes, self.scope = every, passes, scope
        self.pick, self.num_edits, self.counts, self.begin = pick, num_edits, counts, begin
        self.random = pick == "sample"

    def check(self, schedule: Schedule) -> None:
        """Raises UserError where no step is one that corrects."""
        steps = schedule.block_steps * (1 if self.counts == "block" else schedule.blocks)
        if self.passes and steps // self.every * self.every < self.begin:
            what = f"a block has {steps} steps" if self.counts == "block" else f"the text has {steps} steps"
            told = f"every={self.every} begin={self.begin} never corrects where {what}"
            advice = ", counts=text" if self.counts == "block" and schedule.blocks > 1 else ""
            raise UserError(f"{told}: lower these, or take more steps{advice}, or passes=0 for no corrections")

    def editable(self, state: State) -> Tensor:
        return self._region(state) & state.visible

    def reads(self, state: State) -> Tensor:
        """The whole draft is filled, later blocks too."""
        return ~state.visible & self._fires(state)[:, None]

    def refine(self, state: State, prediction: Prediction, predict: Predict) -> Prediction:
        """The logits of the last pass where the draft is corrected, those of the first call elsewhere."""
        region = self._region(state) & prediction.where
        draft = torch.where(state.visible, state.tokens, prediction.best)
        said = Corrected.of(prediction, draft)
        new = (draft != state.tokens).any(1)  # (B,) whether the logits are not those of the draft
        for number in range(self.passes):
            region = region & ~(new & (state.spare <= number))[:, None]
            asked = region & new[:, None]
            if asked.any():
                said.ask(predict, asked)
            elif not region.any():
                break
            draft = self._change(state, said, region, predict)
            new = (draft != said.draft).any(1)
            said.draft = draft
            if not self.random:
                region = region & new[:, None]  # a draft that stays as it is will never change
        return said

    def overwrite(self, state: State, prediction: Prediction) -> Tensor:
        assert isinstance(prediction, Corrected)
        return prediction.draft

    def _change(self, state: State, said: Corrected, region: Tensor, predict: Predict) -> Tensor:
        """(B, L) the next draft, changed where `region` is true."""
        draft, special = said.draft.clone(), predict.special
        if self.pick == "sample":
            logits = said.at(region)[:, : special.vocab_size]
            logits[:, special.mask] = -torch.inf
            draft[region] = draw(logits, temperature=1.0, noise=state.noise, counts=region.sum(1).tolist())
            return draft
        if self.pick == "edit":
            region = region & (said.best != draft)
            count = torch.full_like(state.step, self.num_edits or 0)
            region = top(said.confidence(region, said.best), region, count)
        return torch.where(region, said.best, draft)

    def _fires(self, state: State) -> Tensor:
        """(B,) bool: whether this step corrects."""
        number = 1 + (state.made if self.counts == "block" else state.step)
        due = (number % self.every == 0) & (number >= self.begin)
        return (due | (state.made < 0)) & (self.passes > 0)

    def _region(self, state: State) -> Tensor:
        """(B, L) bool: what a correction may change."""
        up_to_block = state.block.flip(1).cumsum(1).flip(1) > 0
        where = up_to_block if self.scope == "written" else state.block
        return where & self._fires(state)[:, None]
