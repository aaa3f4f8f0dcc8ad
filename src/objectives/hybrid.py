"""Hybrid noise, masks and random tokens from one process, with the cheap form of its loss (GIDD, arXiv 2503.04482).

at noise level t hide tokens and replace others at random -> cross-entropy on hidden, replaced and untouched tokens

GIDD's own weights are close to constants for each kind ("dynamic"): 2 for hidden, 1 for replaced, next to nothing for
untouched tokens. Cross-entropy with these takes the place of its KL divergences: not the bound, the same optimum.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from src.batch import Kind, SpecialIds
from src.diffusion.corruption import Hybrid
from src.diffusion.losses import Term
from src.objectives.base import Objective, Training


class HybridNoise(Objective):
    """share: of random tokens at t = 1/2; mask, wrong, clean: coefficients; weight, reduce, floor: see `Term`."""

    def __init__(
        self,
        *,
        backbone: Callable[[], nn.Module],
        special: SpecialIds,
        training: Training,
        t_min: float = 0.001,
        share: float = 0.1,
        mask: float = 2.0,
        wrong: float = 1.0,
        clean: float = 0.05,
        weight: str = "one",
        reduce: str = "answer_len",
        floor: float = 0.0,
        seed: int = 0,
    ) -> None:
        rows = ((Kind.MASK, mask), (Kind.SYNTAX, wrong), (Kind.CLEAN, clean))
        terms = tuple(Term(kind.name.lower(), kind, weight, reduce, coef=c, floor=floor) for kind, c in rows if c)
        super().__init__(
            backbone=backbone,
            special=special,
            training=training,
            corruption=Hybrid(special=special, share=share),
            terms=terms,
            t_min=t_min,
            seed=seed,
        )
