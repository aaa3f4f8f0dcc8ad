"""Editing where the model is sure, and hiding what it doubts: revisers that read the logits of the step itself.

ThresholdEdit(tau=0.5, block_passes=16)         LLaDA2.1 (arXiv 2602.08676)
TokenToMask(below=0.1, differs=0.9, gap=0.3)    hides suspicious tokens again (arXiv 2604.18738)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from src.io.errors import UserError
from src.samplers.reviser import Corrected, Predict, Prediction, Reviser, State


class ThresholdEdit(Reviser):
    """A visible token whose argmax is another one, of a probability above `tau`, becomes that one.

    With tau=0 this is `OverwriteAll`; with tau=1 it never acts.

    scope: `block` leaves the other blocks alone, `all` opens the earlier ones again
    block_passes: a block that is full is edited until nothing changes before the next one is begun, by at most so many
        readings. The last of them is the next block's first step. After the last block there are the `post_steps`
    """

    def __init__(self, *, tau: float, scope: Literal["block", "all"] = "block", block_passes: int = 0) -> None:
        if not 0 <= tau <= 1:
            raise UserError(f"tau must be within 0..1, got {tau}")
        if scope not in ("block", "all"):
            raise UserError(f"scope must be 'block' or 'all', got {scope!r}")
        if block_passes < 0:
            raise UserError(f"block_passes must be at least 0, got {block_passes}")
        self.tau, self.scope, self.block_passes = tau, scope, block_passes

    def editable(self, state: State) -> Tensor:
        return state.visible & (self._open(state) | self._closing(state))

    def refine(self, state: State, prediction: Prediction, predict: Predict) -> Prediction:
        """Edit the block that was filled last, and read the text again while that changes it."""
        region = self._closing(state) & state.visible & prediction.where
        said = Corrected.of(prediction, state.tokens)
        for number in range(self.block_passes):
            edited = self._edit(said, region & (state.spare > number)[:, None])
            new = (edited != said.draft).any(1)[:, None]
            if not new.any():
                break
            said.draft = edited
            said.ask(predict, prediction.where & new)  # a row that stays as it is will not change any more
        return said

    def overwrite(self, state: State, prediction: Prediction) -> Tensor:
        assert isinstance(prediction, Corrected)
        return self._edit(prediction, self._open(state) & state.visible & prediction.where)

    def _edit(self, said: Corrected, region: Tensor) -> Tensor:
        """(B, L) the draft, edited where `region` is true."""
        region = region & (said.best != said.draft)
        return torch.where(region & (said.confidence(region, said.best) > self.tau), said.best, said.draft)

    def _open(self, state: State) -> Tensor:
        """(B, L) bool: what every step may edit."""
        return state.block if self.scope == "block" else torch.ones_like(state.block)

    def _closing(self, state: State) -> Tensor:
        """(B, L) bool: the block before the current one, in the first step of a row in this block."""
        first = (state.left == state.steps) & (self.block_passes > 0)  # (B,)
        start, size = state.block.int().argmax(1, keepdim=True), state.block.sum(1, keepdim=True)
        place = torch.arange(state.block.shape[1], device=state.block.device)
        return (place < start) & (place >= start - size) & first[:, None]


class TokenToMask(Reviser):
    """A visible token is hidden again where any of three things speaks against it; null leaves one out.

    below: its probability is lower than this
    differs: the argmax is another token, of a probability above this
    gap: its probability has fallen by more than this since it was unmasked (the paper compares with the step before)
    limit: how often one position may be hidden again, so that a text on which the model cannot agree comes to an end
    """

    def __init__(
        self, *, below: float | None = 0.1, differs: float | None = 0.9, gap: float | None = 0.3, limit: int = 3
    ) -> None:
        for name, value in {"below": below, "differs": differs, "gap": gap}.items():
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} must be within 0..1 or null, got {value}")
        if below is None and differs is None and gap is None:
            raise UserError("below, differs and gap are all null, so that nothing is ever hidden")
        if limit < 1:
            raise UserError(f"limit must be at least 1, got {limit}")
        self.below, self.differs, self.gap, self.limit = below, differs, gap, limit

    def remask(self, state: State, prediction: Prediction) -> Tensor:
        where = self.editable(state) & prediction.where & (state.hidden < self.limit)
        own, best = (prediction.confidence(where, tokens) for tokens in (state.tokens, prediction.best))
        doubt = torch.zeros_like(where)
        if self.below is not None:
            doubt |= own < self.below
        if self.differs is not None:
            doubt |= (prediction.best != state.tokens) & (best > self.differs)
        if self.gap is not None:
            doubt |= state.sure.isfinite() & (state.sure - own > self.gap)
        return where & doubt
