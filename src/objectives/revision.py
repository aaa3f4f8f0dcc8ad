"""Foundational revision: Stage I of ReDiff (arXiv 2510.19871, section 3.2).

mask tokens with probability t -> replace visible tokens at random -> replace a true span by a hallucinated span
-> cross-entropy on masked, replaced, hallucinated and clean tokens, a separate mean for each kind,
   weight 1/t in the paper (conf/stage1.yaml: 1)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from src.diffusion.corruption import Absorb, Chain, Choose, Only, Replace, Span
from src.diffusion.losses import Term
from src.io.errors import UserError
from src.objectives.base import Objective
from src.objectives.optim import Training
from src.types import Corruption, Kind, SpecialIds


def stage_one_corruption(
    special: SpecialIds, *, rate: float, source: str, dynamic: bool, hallucination: str, alone_share: float
) -> Corruption:
    """The Stage I corruption; see `RevisionObjective`. Raises UserError for an unknown `hallucination`."""
    noise = [Absorb(special=special), Replace(special=special, rate=rate, source=source, dynamic=dynamic)]
    if hallucination == "mixed":
        return Chain(*noise, Span())
    if hallucination == "alone":
        alone = Only(Span(), rest=Kind.FROZEN)
        return Choose(when="spans", then=alone, otherwise=Chain(*noise), share=alone_share)
    if hallucination == "none":
        return Chain(*noise)
    raise UserError(f"hallucination must be 'mixed', 'alone' or 'none', got {hallucination!r}")


def stage_one_terms(*, weight: str, reduce: str, floor: float, syntax: float, hallucination: float, clean: float):
    """The four terms of Stage I; a coefficient of 0 omits its term."""
    rows = ((Kind.MASK, 1.0), (Kind.SYNTAX, syntax), (Kind.HALLUCINATION, hallucination), (Kind.CLEAN, clean))
    return tuple(Term(k.name.lower(), k, weight, reduce, coef=c, floor=floor) for k, c in rows if c)


class RevisionObjective(Objective):
    """Stage I.

    rate, source, dynamic: random replacements, see `Replace`; rate 0 trains without syntax errors
    hallucination: `mixed`: masks, noise and a hallucinated span in one sample (paper)
        `alone`: a share `alone_share` of the samples that have hallucinated spans get one and no other noise (released
        code, where the data determine this share)
        `none`: no hallucinated spans
    weight, reduce, floor: of every term, see `Term`; clean: coefficient of the clean tokens
    """

    def __init__(
        self,
        *,
        backbone: Callable[[], nn.Module],
        special: SpecialIds,
        training: Training,
        t_min: float = 0.001,
        rate: float = 0.10,
        source: str = "uniform",
        dynamic: bool = False,
        hallucination: str = "mixed",
        alone_share: float = 0.6,
        weight: str = "inverse_rate",
        reduce: str = "kind_mean",
        floor: float = 0.05,
        clean: float = 1.0,
        seed: int = 0,
    ) -> None:
        terms = stage_one_terms(
            weight=weight,
            reduce=reduce,
            floor=floor,
            clean=clean,
            syntax=float(rate > 0),
            hallucination=float(hallucination != "none"),
        )
        corruption = stage_one_corruption(
            special, rate=rate, source=source, dynamic=dynamic, hallucination=hallucination, alone_share=alone_share
        )
        super().__init__(
            backbone=backbone,
            special=special,
            training=training,
            corruption=corruption,
            terms=terms,
            t_min=t_min,
            seed=seed,
        )
