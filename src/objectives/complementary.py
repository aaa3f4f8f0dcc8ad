"""Complementary masks: mask prediction with a loss on every token in each step (LaViDa, arXiv 2505.16839).

mask tokens with probability t; in a second copy mask exactly the others -> cross-entropy on the masked tokens of both

Both copies share one encoded prefix. Every token gets a loss, so no short response goes without one.
"""

from __future__ import annotations

import torch

from src.objectives.mask import MaskPrediction
from src.types import Batch, Corrupted, Kind


class ComplementaryMasks(MaskPrediction):
    """`MaskPrediction` with a complementary copy of each view, at noise level 1 - t."""

    def corrupt(self, batch: Batch) -> list[Corrupted]:
        views = super().corrupt(batch)
        return [state for view in views for state in (view, self._complement(view))]

    def _complement(self, state: Corrupted) -> Corrupted:
        """The copy in which masked and clean tokens trade places."""
        clean, masked = state.where(Kind.CLEAN), state.where(Kind.MASK)
        tokens = torch.where(masked, state.target, state.tokens).masked_fill(clean, self.special.mask)
        kind = state.kind.masked_fill(clean, int(Kind.MASK)).masked_fill(masked, int(Kind.CLEAN))
        return Corrupted(tokens, state.target, kind, (1 - state.rate).clamp(min=self.t_min))
