"""Complementary masks: mask prediction that sees every token once a step (LaViDa, arXiv 2505.16839).

hide tokens with probability t, and in a second copy of the sample hide all the others -> cross-entropy on the hidden

Both copies stand behind one encoded prefix. Every token bears a loss, so a short answer is never skipped.
"""

from __future__ import annotations

import torch

from src.objectives.mask import MaskPrediction
from src.types import Batch, Corrupted, Kind


class ComplementaryMasks(MaskPrediction):
    """`MaskPrediction` with each view doubled; the weight of the copy is that of its own noise level, 1 - t."""

    def corrupt(self, batch: Batch) -> list[Corrupted]:
        views = super().corrupt(batch)
        return [state for view in views for state in (view, self._complement(view))]

    def _complement(self, state: Corrupted) -> Corrupted:
        hide, show = state.where(Kind.CLEAN), state.where(Kind.MASK)
        tokens = torch.where(show, state.target, state.tokens).masked_fill(hide, self.special.mask)
        kind = state.kind.masked_fill(hide, int(Kind.MASK)).masked_fill(show, int(Kind.CLEAN))
        return Corrupted(tokens, state.target, kind, (1 - state.rate).clamp(min=self.t_min))
