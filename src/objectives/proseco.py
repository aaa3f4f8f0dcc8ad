"""ProSeCo: a denoiser that learns to correct its own outputs (arXiv 2602.11590).

1. mask tokens with probability t -> cross-entropy on masked tokens, as in MDLM
2. fill the response with the network's own predictions, without gradient: the draft
3. run the network on the draft, which has no masks -> cross-entropy on all tokens, with the same weight 1/t

One network is a denoiser on inputs with masks and a corrector on inputs without. The backward of the first pass runs
before the second forward, so both need the memory of one; this is exact, as the draft is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from src.diffusion.corruption import Absorb, Replace
from src.diffusion.losses import Term, editable
from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.objectives.base import Objective
from src.objectives.optim import Training
from src.samplers.unmask import draw
from src.types import Batch, Corrupted, Kind, Loss, Prefix, SpecialIds

FILLS = ("all", "masked")
PICKS = ("argmax", "sample")


class ProSeCo(Objective):
    """Two terms, `mask` and `correct`; with `errors` the second is split into `wrong` and `right`.

    fill:   the draft has predictions at `all` positions, so visible tokens may change, too (paper), or at the `masked`
            ones and the true tokens elsewhere (self-generated token edits, arXiv 2606.17175)
    pick:   a prediction is the `argmax` or a `sample`, never the mask or a banned id
    rate:   share of the draft's correct tokens that are replaced at random as well
    errors: use -p(token) instead of the cross-entropy where the draft is correct, so that wrong tokens weigh more
    begin:  optimizer steps of plain mask prediction before the second pass starts
    correct, correct_weight: coefficient and weight (`one` or `inverse_rate`) of the second pass
    weight: of the first pass; reduce (`batch_tokens` or `answer_len`) and floor: of both, see `Term`

    Raises UserError for an unknown fill, pick or reduce, or a negative begin.
    """

    def __init__(
        self,
        *,
        backbone: Callable[[], nn.Module],
        special: SpecialIds,
        training: Training,
        t_min: float = 0.1,
        fill: str = "all",
        pick: str = "argmax",
        rate: float = 0.0,
        errors: bool = False,
        begin: int = 0,
        correct: float = 1.0,
        correct_weight: str = "inverse_rate",
        weight: str = "inverse_rate",
        reduce: str = "batch_tokens",
        floor: float = 0.0,
        seed: int = 0,
    ) -> None:
        if fill not in FILLS:
            raise UserError(f"fill must be one of {FILLS}, got {fill!r}")
        if pick not in PICKS:
            raise UserError(f"pick must be one of {PICKS}, got {pick!r}")
        if reduce not in ("batch_tokens", "answer_len"):
            raise UserError(f"reduce must be 'batch_tokens' or 'answer_len', got {reduce!r}")
        if begin < 0:
            raise UserError(f"begin must be at least 0, got {begin}")
        self.denoising = (Term("mask", Kind.MASK, weight, reduce, floor=floor),)
        correction = partial(Term, kind=None, weight=correct_weight, reduce=reduce, coef=correct, floor=floor)
        if errors:
            self.correcting = (correction("wrong", only="wrong"), correction("right", only="right", form="probability"))
        else:
            self.correcting = (correction("correct"),)
        super().__init__(
            backbone=backbone,
            special=special,
            training=training,
            corruption=Absorb(special=special),
            terms=(*self.denoising, *self.correcting),
            t_min=t_min,
            seed=seed,
        )
        self.fill, self.pick, self.begin = fill, pick, begin
        self.replace = Replace(special=special, rate=rate)

    def passes(self, batch: Batch, prefix: Prefix, state: Corrupted, noise: Noise) -> Iterator[dict[str, Loss]]:
        if self.global_step < self.begin:
            yield self.one_pass(batch, prefix, state, self.denoising)
            return
        everywhere = editable(state)
        filled = everywhere if self.fill == "all" else state.where(Kind.MASK)  # (B, L)
        logits = self.logits(batch, prefix, state, filled)
        predicted = self._predict(logits.detach(), filled, noise)
        losses = self.reduce(logits, filled, state, self.denoising)
        del logits
        yield losses
        draft = self._make_draft(batch, state, filled, predicted, noise)
        self.tally("draft_error_rate", everywhere & (draft.tokens != draft.target), everywhere)
        logits = self.logits(batch, prefix, draft, everywhere)
        yield self.reduce(logits, everywhere, draft, self.correcting)

    def _predict(self, logits: Tensor, where: Tensor, noise: Noise) -> Tensor:
        """(N,) predicted tokens, never the mask or a banned id, at the N true positions of `where` (B, L)."""
        logits = logits.clone()
        logits[:, [self.special.mask, *self.special.banned]] = -torch.inf
        logits[:, self.special.vocab_size :] = -torch.inf
        if self.pick == "argmax":
            return logits.argmax(-1)
        return draw(logits, temperature=1.0, noise=noise, counts=where.sum(1).tolist())

    def _make_draft(self, batch: Batch, state: Corrupted, filled: Tensor, predicted: Tensor, noise: Noise) -> Corrupted:
        """Input of the second pass: MISTAKE if the prediction is wrong, SYNTAX if replaced at random, else CLEAN."""
        tokens = state.target.masked_scatter(filled, predicted)
        kind = torch.where(tokens == state.target, int(Kind.CLEAN), int(Kind.MISTAKE)).to(state.kind.dtype)
        kind = kind.masked_fill(state.where(Kind.FROZEN), int(Kind.FROZEN))
        return self.replace(batch, Corrupted(tokens, state.target, kind, state.rate), noise)
