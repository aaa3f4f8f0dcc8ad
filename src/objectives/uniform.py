"""Uniform noise: random tokens and no masks (D3PM/UDLM; discrete flow matching with the mixture path).

replace each token by a random one with probability t -> cross-entropy on all tokens

This is the objective of the mixture path from uniform noise (arXiv 2407.15595), and the simple loss of D3PM and FUDOKI.
The network gets no t as input; it can infer t from the text. Sample with sampler=uniform or sampler=flow.
"""

from __future__ import annotations

from src.diffusion.corruption import Replace
from src.diffusion.losses import Term
from src.objectives.base import Objective, Setup


class UniformNoise(Objective):
    """One term on all tokens. weight, reduce and floor: see `Term`; the others: see `Objective`."""

    def __init__(
        self, setup: Setup, *, t_min: float = 0.001, weight: str = "one", reduce: str = "answer_len", floor: float = 0.0
    ) -> None:
        replace = Replace(special=setup.special, rate=1.0, dynamic=True, filler=True)  # with probability t
        terms = (Term("token", None, weight, reduce, floor=floor),)
        super().__init__(setup, corruption=replace, terms=terms, t_min=t_min)
