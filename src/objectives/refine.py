"""Online self-correction: Stage II of ReDiff (arXiv 2510.19871, section 3.3).

rows of an online round: the model's own draft -> cross-entropy on the spans that the expert corrected, without 1/t
other rows (a small share of Stage I data): as in `src.objectives.revision`
"""

from __future__ import annotations

from src.diffusion.corruption import Chain, Choose, Only, ShowGaps, Span
from src.diffusion.losses import Term
from src.objectives.base import Objective, Setup
from src.objectives.revision import stage_one
from src.types import Corruption, Kind


class Refine(Objective):
    """Stage II with Stage I data mixed in.

    mistake: coefficient of the corrected spans
    mistake_weight: `one` (paper) or `inverse_rate` (released code: 1/t, although nothing is masked at rate t)
    keep: coefficient of the draft's other tokens (paper: 0)
    shown_gaps: share of the spans whose correction has a gap token that the input shows already corrected, so that
        the model learns to keep gaps; no effect if the tokenizer has no gap token
    the rest: see `RevisionObjective`
    """

    def __init__(
        self,
        setup: Setup,
        *,
        t_min: float = 0.0,
        mistake: float = 1.0,
        mistake_weight: str = "one",
        keep: float = 0.0,
        shown_gaps: float = 0.5,
        rate: float = 0.10,
        source: str = "uniform",
        dynamic: bool = False,
        filler: bool = False,
        hallucination: str = "mixed",
        alone_share: float = 0.6,
        weight: str = "inverse_rate",
        reduce: str = "kind_mean",
        floor: float = 0.05,
        clean: float = 1.0,
    ) -> None:
        corruption, terms = stage_one(
            setup.special,
            rate=rate,
            source=source,
            dynamic=dynamic,
            filler=filler,
            hallucination=hallucination,
            alone_share=alone_share,
            weight=weight,
            reduce=reduce,
            floor=floor,
            clean=clean,
        )
        if mistake:
            terms += (Term("mistake", Kind.MISTAKE, mistake_weight, reduce, coef=mistake, floor=floor),)
        if keep:
            terms += (Term("keep", Kind.DRAFT, "one", reduce, coef=keep),)
        mistakes: Corruption = Span(num=None, kind=Kind.MISTAKE)
        if setup.special.gap is not None:
            mistakes = Chain(mistakes, ShowGaps(gap=setup.special.gap, correct_rate=shown_gaps))
        drafts = Only(mistakes, rest=Kind.DRAFT)
        super().__init__(
            setup, corruption=Choose(when="drafted", then=drafts, otherwise=corruption), terms=terms, t_min=t_min
        )
