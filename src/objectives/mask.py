"""Mask prediction: the objective of LLaDA (arXiv 2502.09992, eq. 3 and SFT), and the baseline of ReDiff.

mask tokens with probability t -> cross-entropy on masked tokens, weight 1/t
"""

from __future__ import annotations

from src.diffusion.corruption import Absorb
from src.diffusion.losses import Term
from src.objectives.base import Objective, Setup
from src.types import Kind


class MaskPrediction(Objective):
    """One term on masked tokens. weight, reduce and floor: see `Term`; the others: see `Objective`."""

    def __init__(
        self,
        setup: Setup,
        *,
        t_min: float = 0.001,
        t_max: float = 1.0,
        weight: str = "inverse_rate",
        reduce: str = "answer_len",
        floor: float = 0.0,
    ) -> None:
        terms = (Term("mask", Kind.MASK, weight, reduce, floor=floor),)
        corruption = Absorb(special=setup.special)
        super().__init__(setup, corruption=corruption, terms=terms, t_min=t_min, t_max=t_max)
