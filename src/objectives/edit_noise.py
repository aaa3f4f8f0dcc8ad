"""Edit noise in the last part of training (SEED Diffusion, arXiv 2508.02193, first stage).

1. mask tokens with probability t -> cross-entropy on masked tokens, weight 1/t
2. after a share `begin` of the steps, in a second pass: random edits of the text, no masks
   -> cross-entropy on all tokens
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from src.diffusion.corruption import OPERATIONS, Absorb, EditNoise, start
from src.diffusion.losses import Term
from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.objectives.base import Objective, Setup
from src.types import Batch, Corrupted, Kind


class EditNoiseObjective(Objective):
    """Two terms, `mask` and `edit`.

    rate, operations, window: see `EditNoise`
    begin: share of the steps without edits
    edit: coefficient of the term `edit`
    weight, floor: of the term `mask`, see `Term`; reduce: of both, `batch_tokens` or `answer_len`

    Raises UserError for a `begin` outside 0..1.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        t_min: float = 0.001,
        rate: float = 0.1,
        operations: Sequence[str] = OPERATIONS,
        window: int = 4,
        begin: float = 0.8,
        edit: float = 1.0,
        weight: str = "inverse_rate",
        reduce: str = "answer_len",
        floor: float = 0.0,
    ) -> None:
        if not 0 <= begin <= 1:
            raise UserError(f"begin must be within 0..1, got {begin}")
        super().__init__(
            setup,
            corruption=Absorb(special=setup.special),
            terms=(Term("mask", Kind.MASK, weight, reduce, floor=floor),),
            second_terms=(Term("edit", None, "one", reduce, coef=edit),),
            t_min=t_min,
        )
        self.begin = begin
        self.edit_noise = EditNoise(special=setup.special, rate=rate, operations=operations, window=window)

    def second_input(
        self, batch: Batch, state: Corrupted, where: Tensor, logits: Tensor, noise: Noise
    ) -> Corrupted | None:
        if self._trainer is not None and self.global_step < self.begin * self.trainer.max_steps:
            return None
        clean = start(batch, state.rate)
        clean.kind = clean.kind.masked_fill(state.where(Kind.FROZEN), int(Kind.FROZEN))  # filler without a loss
        return self.edit_noise(batch, clean, noise)
