"""ReDiff's own decoding: every step also rewrites the visible tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from src.io.errors import UserError
from src.samplers.predictor import Prediction
from src.samplers.reviser import Reviser, State
from src.samplers.unmask import top


@dataclass(frozen=True, kw_only=True)
class OverwriteAll(Reviser):
    """ReDiff: every token that was visible before the step becomes its argmax (arXiv 2510.19871).

    begin: only the last `begin` of a block's steps rewrite, rounded up; 0 leaves it to the post steps
    scope: `block` rewrites the current block, `all` every block. Post steps always rewrite every block
    share: rewrite only this fraction of the visible tokens, rounded down: those with the most probable argmax
    """

    begin: float = 1.0
    scope: Literal["block", "all"] = "block"
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"share must be above 0 and at most 1, got {self.share}")
        if not 0 <= self.begin <= 1:
            raise UserError(f"begin must be within 0..1, got {self.begin}")

    @property
    def within_block(self) -> bool:
        return self.scope == "block"

    def editable(self, state: State) -> Tensor:
        where = state.visible if self.scope == "all" else state.visible & state.block
        if self.begin == 1:
            return where
        rewrites = state.steps_left <= (state.steps.double() * self.begin).ceil()  # (B,)
        return where & rewrites[:, None]

    def overwrite(self, state: State, prediction: Prediction) -> Tensor:
        if self.share == 1:
            return prediction.best
        where = self.editable(state) & prediction.where
        count = (where.sum(1).double() * self.share).long()
        most_confident = top(prediction.confidence(where, prediction.best), where, count)
        return torch.where(most_confident, prediction.best, state.tokens)
