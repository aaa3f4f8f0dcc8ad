"""Online self-correction: Stage II of ReDiff (arXiv 2510.19871, section 3.3).

rows of an online round: the model's own draft -> cross-entropy on the spans that the expert corrected, without 1/t
other rows (a small share of Stage I data): as in `src.objectives.revision`
"""

from __future__ import annotations

from typing import Any

from src.diffusion.corruption import Chain, Choose, Only, ShowGaps, Span
from src.diffusion.losses import Term
from src.objectives.base import Setup
from src.objectives.revision import RevisionObjective
from src.types import Corruption, Kind


class Refine(RevisionObjective):
    """Stage II with Stage I data mixed in.

    mistake: coefficient of the corrected spans
    mistake_weight: `one` (paper) or `inverse_rate` (released code: 1/t, although nothing is masked at rate t)
    keep: coefficient of the draft's other tokens (paper: 0)
    shown_gaps: share of the spans whose correction has a gap token that the input shows already corrected, so that
        the model learns to keep gaps; no effect if the tokenizer has no gap token
    stage1: see `RevisionObjective`
    """

    def __init__(
        self,
        setup: Setup,
        *,
        mistake: float = 1.0,
        mistake_weight: str = "one",
        keep: float = 0.0,
        shown_gaps: float = 0.5,
        reduce: str = "kind_mean",
        floor: float = 0.05,
        **stage1: Any,
    ) -> None:
        super().__init__(setup, reduce=reduce, floor=floor, **stage1)
        # 1. drafts, whose corrected spans are the mistakes
        mistakes: Corruption = Span(num=None, kind=Kind.MISTAKE)
        if setup.special.gap is not None:
            mistakes = Chain(mistakes, ShowGaps(gap=setup.special.gap, correct_rate=shown_gaps))
        drafts = Only(mistakes, rest=Kind.DRAFT)
        self.corruption = Choose(when="drafted", then=drafts, otherwise=self.corruption)
        # 2. their terms
        mistake_term = Term("mistake", Kind.MISTAKE, mistake_weight, reduce, coef=mistake, floor=floor)
        keep_term = Term("keep", Kind.DRAFT, "one", reduce, coef=keep)
        self.first_terms += tuple(term for term in (mistake_term, keep_term) if term.coef)
        self.terms = self.first_terms
