"""Mask prediction that hides the directions of relations on their own: pre-training of the embedded base model.

mask tokens with probability t; in a share of the rows mask instead the word of each relation alone ("left" of "left
of", "above", ...) -> cross-entropy on masked tokens

A direction follows from the places of two named objects. If all of these are drawn at one noise level, few masked
directions leave both names and both places visible, and a small model answers by chance (results/LOG.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from src.io.errors import UserError
from src.objectives.base import Setup
from src.objectives.mask import MaskPrediction
from src.scenes.graph import RELATIONS
from src.text.tokenizer import Codec
from src.types import Batch, Corrupted, Kind


class HiddenRelations(MaskPrediction):
    """`MaskPrediction` with rows whose relations alone are hidden; a row without any is masked as the others are.

    share: of the rows; the others: see `MaskPrediction`

    Raises UserError for a share outside 0..1, or if the words of a relation are no tokens of their own.
    """

    def __init__(self, setup: Setup, *, codec: Codec, share: float, **mask: Any) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"share must be within 0..1, got {share}")
        super().__init__(setup, **mask)
        self.share = share
        words = [relation.split() for relation in RELATIONS]  # one word, or two: `left of`
        self.relations = [[codec.encode(f" {word}")[0] for word in pair] for pair in words]
        if any(len(ids) != 1 for pair in self.relations for ids in pair):
            raise UserError("the tokenizer splits the words of relations: use that of assets/base")

    def corrupt(self, batch: Batch) -> list[Corrupted]:
        views, directions = super().corrupt(batch), self.directions(batch.response)
        return [self._hide(batch, state, directions, view) for view, state in enumerate(views)]

    def directions(self, response: Tensor) -> Tensor:
        """(B, L) bool: the first word of each relation in a response (B, L)."""
        following = torch.cat([response[:, 1:], response[:, -1:]], 1)
        found = torch.zeros_like(response, dtype=torch.bool)
        for (first,), *rest in self.relations:
            found |= (response == first) & (not rest or following == rest[0][0])
        return found

    def _hide(self, batch: Batch, state: Corrupted, directions: Tensor, view: int) -> Corrupted:
        directions = directions & ~state.where(Kind.FROZEN)
        drawn = self.noise(batch, f"{view}/relations").level(device=directions.device) < self.share  # (B,)
        chosen = (drawn & directions.any(1))[:, None]
        kind = state.kind.masked_fill(chosen & state.where(Kind.MASK), int(Kind.CLEAN))
        kind = kind.masked_fill(chosen & directions, int(Kind.MASK))
        tokens = torch.where(chosen, state.target.masked_fill(directions, self.special.mask), state.tokens)
        return Corrupted(tokens, state.target, kind, state.rate)
