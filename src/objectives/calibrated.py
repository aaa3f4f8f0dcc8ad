"""Stage I with one mean over all visible tokens, so that p says how likely each of them is right. Ours, not a paper's.

ReDiff gives every kind of token a mean of its own. Few visible tokens are wrong, so each of them weighs many times as
much as a right one, and the optimum at a visible position is no posterior: a token that is right with probability q
gets q / (q + w (1 - q)), w the ratio of the weights, and is rewritten too often. With equal weights it gets q:

    L = mean over masks of -log p(x_i | z) + visible * mean over visible i, right or wrong, of -log p(x_i | z)

This q holds at the share of wrong words in training, `visible_wrong` in the log. Drafts have another share, for which
`sampler=calibrated` corrects (`src.samplers.calibrated`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from src.diffusion.corruption import text_positions
from src.diffusion.losses import Term
from src.io.errors import UserError
from src.objectives.base import Setup
from src.objectives.revision import RevisionObjective
from src.types import Batch, Corrupted, Kind

VISIBLE = (Kind.CLEAN, Kind.SYNTAX, Kind.HALLUCINATION)


@dataclass(frozen=True)
class VisibleTerm(Term):
    """A term on all visible tokens of a sample, whatever their kind."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return VISIBLE

    def where(self, corrupted: Corrupted) -> Tensor:
        clean, syntax, hallucination = (corrupted.where(kind) for kind in VISIBLE)
        return clean | syntax | hallucination


class Calibrated(RevisionObjective):
    """Two terms, `mask` and `visible`. visible: coefficient of the second; stage1: see `RevisionObjective`.

    weight, reduce and floor hold for both terms. There is no term on clean tokens alone: `clean` cannot be set.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        visible: float = 1.0,
        weight: str = "one",
        reduce: str = "kind_mean",
        floor: float = 0.05,
        **stage1: Any,
    ) -> None:
        if "clean" in stage1:
            raise UserError("clean cannot be set: `visible` is the coefficient of clean and wrong tokens alike")
        super().__init__(setup, weight=weight, reduce=reduce, floor=floor, **stage1)
        self.visible = VisibleTerm("visible", None, weight, reduce, coef=visible, floor=floor)
        self.terms = self.first_terms = (self.first_terms[0], self.visible)  # the first is `mask`

    def corrupt(self, batch: Batch) -> list[Corrupted]:
        """As `Objective.corrupt`; logs the share of the visible words that are wrong, the `prior` of the sampler."""
        views = super().corrupt(batch)
        for state in views:
            visible = self.visible.where(state) & text_positions(state.target, self.special.eot)
            self.tally("visible_wrong", visible & (state.tokens != state.target), visible)
        return views
