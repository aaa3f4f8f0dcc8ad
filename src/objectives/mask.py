"""Mask prediction: the objective of LLaDA (arXiv 2502.09992, eq. 3 and SFT), and the baseline of ReDiff.

mask tokens with probability t -> cross-entropy on masked tokens, weight 1/t
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from src.diffusion.corruption import Absorb
from src.diffusion.losses import Term
from src.objectives.base import Objective
from src.objectives.optim import Training
from src.types import Kind, SpecialIds


class MaskPrediction(Objective):
    """One term on masked tokens. weight, reduce and floor: see `Term`; the others: see `Objective`."""

    def __init__(
        self,
        *,
        backbone: Callable[[], nn.Module],
        special: SpecialIds,
        training: Training,
        t_min: float = 0.001,
        weight: str = "inverse_rate",
        reduce: str = "answer_len",
        floor: float = 0.0,
        seed: int = 0,
    ) -> None:
        terms = (Term("mask", Kind.MASK, weight, reduce, floor=floor),)
        super().__init__(
            backbone=backbone,
            special=special,
            training=training,
            corruption=Absorb(special=special),
            terms=terms,
            t_min=t_min,
            seed=seed,
        )
