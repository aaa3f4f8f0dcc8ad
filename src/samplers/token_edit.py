"""Token edits where the model is confident, remasking where it is not, by the logits of the step itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from src.io.errors import UserError
from src.samplers.predictor import DraftPrediction, Prediction, Predictor, read
from src.samplers.reviser import Reviser, State


@dataclass(frozen=True, kw_only=True)
class ThresholdEdit(Reviser):
    """LLaDA2.1 (arXiv 2602.08676): a visible token becomes its argmax if that has a probability above `tau`.

    scope: `block` edits the current block, `all` every block
    block_passes: forward calls that may edit a full block until nothing changes, before the next one begins. The last
        of them is the first step of the next block. After the last block there are the `post_steps`
    """

    block_passes: int = 0
    scope: Literal["block", "all"] = "block"
    tau: float

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise UserError(f"tau must be within 0..1, got {self.tau}")
        if self.block_passes < 0:
            raise UserError(f"block_passes must be at least 0, got {self.block_passes}")

    def editable(self, state: State) -> Tensor:
        return state.visible & (self._scope(state) | self._previous_block(state))

    def refine(self, state: State, prediction: Prediction, predict: Predictor) -> Prediction:
        """Edit the block that was filled last and predict again, until nothing changes."""
        region = self._previous_block(state) & state.visible & prediction.where
        edited = DraftPrediction.of(prediction, state.tokens)
        for number in range(self.block_passes):
            draft = self._edit(edited, region & (state.spare_passes > number)[:, None])
            (changed,) = read((draft != edited.draft).any(1) & prediction.where.any(1))
            if not any(changed):
                break
            edited.draft = draft
            edited.update(predict, changed)  # an unchanged row will not change any more
        return edited

    def overwrite(self, state: State, prediction: Prediction) -> Tensor:
        assert isinstance(prediction, DraftPrediction)
        return self._edit(prediction, self._scope(state) & state.visible & prediction.where)

    def _edit(self, prediction: DraftPrediction, region: Tensor) -> Tensor:
        region = region & (prediction.best != prediction.draft)
        region = region & (prediction.confidence(region, prediction.best) > self.tau)
        return torch.where(region, prediction.best, prediction.draft)

    def _scope(self, state: State) -> Tensor:
        return state.block if self.scope == "block" else torch.ones_like(state.block)

    def _previous_block(self, state: State) -> Tensor:
        # (B, L) bool: the block before the current one, for rows in the first step of a block
        first = (state.steps_left == state.steps) & (self.block_passes > 0)  # (B,)
        start, size = state.block.int().argmax(1, keepdim=True), state.block.sum(1, keepdim=True)
        place = torch.arange(state.block.shape[1], device=state.block.device)
        return (place < start) & (place >= start - size) & first[:, None]


@dataclass(frozen=True, kw_only=True)
class TokenToMask(Reviser):
    """Remasks a visible token if any of three conditions holds (arXiv 2604.18738); null switches a condition off.

    below: its probability is lower than this
    differs: the argmax is another token, with a probability above this
    gap: its probability has fallen by more than this since it was unmasked (the paper compares with the step before)
    limit: how often one position may be remasked, so that a text on which the model cannot settle ends
    """

    below: float | None = 0.1
    differs: float | None = 0.9
    gap: float | None = 0.3
    limit: int = 3

    def __post_init__(self) -> None:
        for name in ("below", "differs", "gap"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} must be within 0..1 or null, got {value}")
        if self.below is None and self.differs is None and self.gap is None:
            raise UserError("below, differs and gap are all null, so nothing is ever remasked: set one of them")
        if self.limit < 1:
            raise UserError(f"limit must be at least 1, got {self.limit}")

    def remask(self, state: State, prediction: Prediction) -> Tensor:
        where = self.editable(state) & prediction.where & (state.num_remasks < self.limit)
        own, best = (prediction.confidence(where, tokens) for tokens in (state.tokens, prediction.best))
        suspicious = torch.zeros_like(where)
        if self.below is not None:
            suspicious |= own < self.below
        if self.differs is not None:
            suspicious |= (prediction.best != state.tokens) & (best > self.differs)
        if self.gap is not None:
            suspicious |= state.confidence.isfinite() & (state.confidence - own > self.gap)
        return where & suspicious
