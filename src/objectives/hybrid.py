"""Hybrid noise: masks and random tokens from one process, with a simplified loss (GIDD, arXiv 2503.04482).

at noise level t mask tokens and replace others at random -> cross-entropy on masked, replaced and clean tokens

Cross-entropy replaces GIDD's KL divergences. The input does not show whether a visible token is correct, so replaced
and clean tokens need equal weights: then the optimum is the probability of the true token, as with GIDD's loss.
A smaller weight for clean tokens, close to GIDD's "dynamic" weights, biases the optimum: a token that is correct with
probability q gets the probability clean q / (clean q + wrong (1 - q)).
"""

from __future__ import annotations

from src.diffusion.corruption import Hybrid
from src.diffusion.losses import Term
from src.objectives.base import Objective, Setup
from src.types import Kind


class HybridNoise(Objective):
    """A term each for masked, replaced and clean tokens.

    share: share of random tokens at t = 1/2
    mask, wrong, clean: coefficients of the terms; weight, reduce, floor: see `Term`
    """

    def __init__(
        self,
        setup: Setup,
        *,
        t_min: float = 0.001,
        share: float = 0.1,
        mask: float = 2.0,
        wrong: float = 1.0,
        clean: float = 1.0,
        weight: str = "one",
        reduce: str = "answer_len",
        floor: float = 0.0,
    ) -> None:
        rows = ((Kind.MASK, mask), (Kind.SYNTAX, wrong), (Kind.CLEAN, clean))
        terms = tuple(Term(kind.name.lower(), kind, weight, reduce, coef=c, floor=floor) for kind, c in rows if c)
        super().__init__(setup, corruption=Hybrid(special=setup.special, share=share), terms=terms, t_min=t_min)
