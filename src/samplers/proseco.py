"""ProSeCo's corrector: the model reads its own full draft, several times if it changes (arXiv 2602.11590).

The same network is a denoiser where it sees masks and a corrector where it sees none. A correcting step fills every
mask with its argmax and runs the network on that draft up to `passes` times; each pass changes the draft by the new
logits. Visible tokens become those of the last draft, and masks are unmasked by the last logits.

Forward calls: at most T + floor(T / every) * passes for T steps, none for logits that are known, as the network gets no
time. Guidance holds for corrections too, at two calls a pass; the released code drops it there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from src.io.errors import UserError
from src.samplers.predictor import DraftPrediction, Prediction, Predictor, read
from src.samplers.reviser import Reviser, State
from src.samplers.schedule import Schedule
from src.samplers.unmask import draw, top


@dataclass(kw_only=True)
class Corrector(Reviser):
    """Corrects in every `every`-th step, and in post steps.

    begin:  first step, by the count of `counts`, that may correct
    counts: steps are counted from 1 in each `block` (LLaDA, as released) or over the whole `text`
    passes: most forward calls of one correction; 0 never corrects
    pick:   how a pass changes the draft. `argmax`: every token becomes its argmax. `sample`: every token is drawn at
            temperature 1. `edit`: as `argmax`, but only the `num_edits` changes whose new token is most probable
    scope:  `written` corrects the current block and all before it, `block` only the current one
    """

    begin: int = 1
    counts: Literal["block", "text"] = "block"
    every: int = 1
    num_edits: int | None = None
    passes: int = 1
    pick: Literal["argmax", "sample", "edit"] = "argmax"
    random: bool = field(init=False)
    scope: Literal["written", "block"] = "written"

    def __post_init__(self) -> None:
        if self.every < 1 or self.passes < 0 or self.begin < 1:
            numbers = f"every={self.every} begin={self.begin} passes={self.passes}"
            raise UserError(f"every and begin must be at least 1 and passes at least 0, got {numbers}")
        if (self.num_edits is not None) != (self.pick == "edit") or (self.num_edits is not None and self.num_edits < 1):
            raise UserError(f"num_edits must be at least 1 with pick=edit and null without it, got {self.num_edits}")
        self.random = self.pick == "sample"

    def check(self, schedule: Schedule) -> None:
        steps = schedule.block_steps * (1 if self.counts == "block" else schedule.blocks)
        if self.passes and steps // self.every * self.every < self.begin:
            raise UserError(
                f"every={self.every} begin={self.begin} never corrects where a {self.counts} has {steps} steps: "
                "lower these, or take more steps, or counts=text, or passes=0 for no corrections"
            )

    def editable(self, state: State) -> Tensor:
        return self._region(state) & state.visible

    def reads(self, state: State) -> Tensor:
        """Also all masks, in later blocks too: the draft is full."""
        return self.editable(state) | (~state.visible & self._corrects(state)[:, None])

    def refine(self, state: State, prediction: Prediction, predict: Predictor) -> Prediction:
        """The logits of the last pass where the draft is corrected, those of the first call elsewhere."""
        region = self._region(state) & prediction.where
        # 1. fill every mask with its argmax
        draft = torch.where(state.visible, state.tokens, prediction.best)
        corrected = DraftPrediction.of(prediction, draft)
        stale = (draft != state.tokens).any(1)  # (B,) whether the logits are of another text than the draft
        # 2. predict the draft, change it, and repeat
        for number in range(self.passes):
            region = region & ~(stale & (state.spare_passes <= number))[:, None]
            changing = region.any(1)
            called, left = read(changing & stale, changing)
            if not any(left):
                break
            corrected.update(predict, called)
            draft = self._change(state, corrected, region, predict)
            stale = (draft != corrected.draft).any(1)
            corrected.draft = draft
            if not self.random:
                region = region & stale[:, None]  # an unchanged draft will never change
        return corrected

    def overwrite(self, state: State, prediction: Prediction) -> Tensor:
        assert isinstance(prediction, DraftPrediction)
        return prediction.draft

    def _change(self, state: State, corrected: DraftPrediction, region: Tensor, predict: Predictor) -> Tensor:
        draft = corrected.draft
        if self.pick == "sample":
            everywhere = torch.arange(draft.numel(), device=draft.device)
            options = {"special": predict.special, "temperature": 1.0, "noise": state.noise}
            drawn = draw(corrected.logits.flatten(0, 1), everywhere, everywhere, region, **options)
            return torch.where(region, drawn.view_as(draft), draft)
        if self.pick == "edit":
            region = region & (corrected.best != draft)
            count = torch.full_like(state.step, self.num_edits or 0)
            region = top(corrected.confidence(region, corrected.best), region, count)
        return torch.where(region, corrected.best, draft)

    def _corrects(self, state: State) -> Tensor:
        number = 1 + (state.steps_done if self.counts == "block" else state.step)
        due = (number % self.every == 0) & (number >= self.begin)
        return (due | (state.steps_done < 0)) & (self.passes > 0)

    def _region(self, state: State) -> Tensor:
        """(B, L) bool: what a correction may change."""
        up_to_block = state.block.flip(1).cumsum(1).flip(1) > 0
        where = up_to_block if self.scope == "written" else state.block
        return where & self._corrects(state)[:, None]
