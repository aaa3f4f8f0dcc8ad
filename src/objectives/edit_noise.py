"""Edit noise in the last part of training (SEED Diffusion, arXiv 2508.02193, first stage).

1. mask tokens with probability t -> cross-entropy on masked tokens, weight 1/t
2. after a share `begin` of the steps, in a second pass: random edits of the text, no masks
   -> cross-entropy on all tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from src.diffusion.corruption import OPERATIONS, Absorb, EditNoise, start
from src.diffusion.losses import Term
from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.objectives.base import Objective
from src.objectives.optim import Training
from src.types import Batch, Corrupted, Kind, Loss, Prefix, SpecialIds


class EditNoiseObjective(Objective):
    """Two terms, `mask` and `edit`.

    rate, operations, window: see `EditNoise`
    begin: share of the steps without edits
    edit: coefficient of the term `edit`
    weight, floor: of the term `mask`, see `Term`; reduce: of both, `batch_tokens` or `answer_len`

    Raises UserError for any other `reduce`, or a `begin` outside 0..1.
    """

    def __init__(
        self,
        *,
        backbone: Callable[[], nn.Module],
        special: SpecialIds,
        training: Training,
        t_min: float = 0.001,
        rate: float = 0.1,
        operations: Sequence[str] = OPERATIONS,
        window: int = 4,
        begin: float = 0.8,
        edit: float = 1.0,
        weight: str = "inverse_rate",
        reduce: str = "answer_len",
        floor: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= begin <= 1:
            raise UserError(f"begin must be within 0..1, got {begin}")
        if reduce not in ("batch_tokens", "answer_len"):
            raise UserError(f"reduce must be 'batch_tokens' or 'answer_len', got {reduce!r}")
        self.masked = (Term("mask", Kind.MASK, weight, reduce, floor=floor),)
        self.edited = (Term("edit", None, "one", reduce, coef=edit),)
        super().__init__(
            backbone=backbone,
            special=special,
            training=training,
            corruption=Absorb(special=special),
            terms=(*self.masked, *self.edited),
            t_min=t_min,
            seed=seed,
        )
        self.begin, self.edit_noise = begin, EditNoise(special=special, rate=rate, operations=operations, window=window)

    def passes(self, batch: Batch, prefix: Prefix, state: Corrupted, noise: Noise) -> Iterator[dict[str, Loss]]:
        yield self.one_pass(batch, prefix, state, self.masked)
        if self._has_begun():
            edited = self.edit_noise(batch, start(batch, state.rate), noise)
            yield self.one_pass(batch, prefix, edited, self.edited)

    def _has_begun(self) -> bool:
        """Whether a share `begin` of the steps is over; true without a trainer."""
        return self._trainer is None or self.global_step >= self.begin * self.trainer.max_steps
