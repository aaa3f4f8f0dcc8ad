"""ProSeCo: a denoiser that learns to correct its own outputs (arXiv 2602.11590).

1. mask tokens with probability t -> cross-entropy on masked tokens, as in MDLM
2. fill the response with the network's own predictions, without gradient: the draft
3. run the network on the draft, which has no masks -> cross-entropy on all tokens, with the same weight 1/t

One network is a denoiser on inputs with masks and a corrector on inputs without. The backward of the first pass runs
before the second forward, so both need the memory of one; this is exact, as the draft is a constant.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from src.diffusion.corruption import Absorb, Replace
from src.diffusion.losses import Term, editable
from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.objectives.base import Objective, Setup
from src.samplers.unmask import draw
from src.types import Batch, Corrupted, Kind

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
    weight: of the first pass; reduce (not `tokens`) and floor: of both, see `Term`

    Raises UserError for an unknown fill or pick, or a negative begin.
    """

    def __init__(
        self,
        setup: Setup,
        *,
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
    ) -> None:
        if fill not in FILLS:
            raise UserError(f"fill must be one of {FILLS}, got {fill!r}")
        if pick not in PICKS:
            raise UserError(f"pick must be one of {PICKS}, got {pick!r}")
        if begin < 0:
            raise UserError(f"begin must be at least 0, got {begin}")
        correction = partial(Term, kind=None, weight=correct_weight, reduce=reduce, coef=correct, floor=floor)
        terms, second_terms = (Term("mask", Kind.MASK, weight, reduce, floor=floor),), (correction("correct"),)
        if errors:
            second_terms = (correction("wrong", only="wrong"), correction("right", only="right", form="probability"))
        mask = Absorb(special=setup.special)
        super().__init__(setup, corruption=mask, terms=terms, second_terms=second_terms, t_min=t_min)
        self.fill, self.pick, self.begin = fill, pick, begin
        self.replace = Replace(special=setup.special, rate=rate)

    def positions(self, terms: tuple[Term, ...], state: Corrupted) -> Tensor:
        """(B, L) bool: those that the draft fills with predictions."""
        return editable(state) if self.fill == "all" else super().positions(terms, state)

    def second_input(
        self, batch: Batch, state: Corrupted, where: Tensor, logits: Tensor, noise: Noise
    ) -> Corrupted | None:
        """The draft: MISTAKE where a prediction is wrong, SYNTAX where replaced at random, else CLEAN."""
        if self.global_step < self.begin:
            return None
        # 1. Predict, never the mask or a banned id.
        if self.pick == "argmax":
            predicted = self.special.argmax(logits)  # (N,)
        else:
            at = torch.nonzero_static(where.flatten(), size=len(logits))[:, 0]
            options = {"special": self.special, "temperature": 1.0, "noise": noise}
            predicted = draw(self.special.ban(logits), torch.arange(len(at), device=at.device), at, where, **options)
        # 2. The true tokens elsewhere.
        tokens = state.target.masked_scatter(where, predicted)  # (B, L)
        kind = torch.where(tokens == state.target, int(Kind.CLEAN), int(Kind.MISTAKE)).to(state.kind.dtype)
        kind = kind.masked_fill(state.where(Kind.FROZEN), int(Kind.FROZEN))
        # 3. Replace some of the correct tokens.
        draft = self.replace(batch, Corrupted(tokens, state.target, kind, state.rate), noise)
        everywhere = editable(state)
        self.tally("draft_error_rate", everywhere & (draft.tokens != draft.target), everywhere)
        return draft
