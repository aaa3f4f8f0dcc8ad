"""Foundational revision: Stage I of ReDiff (arXiv 2510.19871, section 3.2).

mask tokens with probability t -> replace visible tokens at random -> replace a true span by a hallucinated span
-> cross-entropy on masked, replaced, hallucinated and clean tokens, a separate mean for each kind,
   weight 1/t in the paper (conf/stage1.yaml: 1)
"""

from __future__ import annotations

from src.diffusion.corruption import Absorb, Chain, Choose, Only, Replace, Span
from src.diffusion.losses import Term
from src.io.errors import UserError
from src.objectives.base import Objective, Setup
from src.types import Corruption, Kind


class RevisionObjective(Objective):
    """Stage I.

    rate, source, dynamic, filler: random replacements, see `Replace`; rate 0 trains without syntax errors
    hallucination: `mixed`: masks, noise and a hallucinated span in one sample (paper)
        `alone`: a share `alone_share` of the samples that have hallucinated spans get one and no other noise (released
        code, where the data determine this share)
        `none`: no hallucinated spans
    weight, reduce, floor: of every term, see `Term`; clean: coefficient of the clean tokens
    second_terms: of a subclass that has a second pass
    """

    def __init__(
        self,
        setup: Setup,
        *,
        t_min: float = 0.0,
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
        second_terms: tuple[Term, ...] = (),
    ) -> None:
        # 1. masks, then random tokens
        mask = Absorb(special=setup.special)
        replace = Replace(special=setup.special, rate=rate, source=source, dynamic=dynamic, filler=filler)
        corruption: Corruption = Chain(mask, replace)
        # 2. hallucinated spans
        if hallucination == "mixed":
            corruption = Chain(mask, replace, Span())
        elif hallucination == "alone":
            alone = Only(Span(), rest=Kind.FROZEN)
            corruption = Choose(when="spans", then=alone, otherwise=corruption, share=alone_share)
        elif hallucination != "none":
            raise UserError(f"hallucination must be 'mixed', 'alone' or 'none', got {hallucination!r}")
        # 3. one term for each kind of token
        kinds = {Kind.MASK: 1.0, Kind.SYNTAX: float(rate > 0), Kind.CLEAN: clean}
        kinds[Kind.HALLUCINATION] = float(hallucination != "none")
        terms = tuple(
            Term(kind.name.lower(), kind, weight, reduce, coef=kinds[kind], floor=floor)
            for kind in (Kind.MASK, Kind.SYNTAX, Kind.HALLUCINATION, Kind.CLEAN)
            if kinds[kind]
        )
        super().__init__(setup, corruption=corruption, terms=terms, second_terms=second_terms, t_min=t_min)
