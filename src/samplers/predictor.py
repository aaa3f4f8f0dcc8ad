"""Forward calls of a sampler: only for rows that need logits, guided if asked for, counted, and cached.

B rows, L response positions, N positions with logits, S suffix positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from src.samplers.unmask import SCORES
from src.types import Backbone, Prefix, SpecialIds


@dataclass
class Prediction:
    """Logits of the backbone at the true positions of `where` (B, L).

    logits: (N, V) float32 at those positions in row-major order. -inf at banned ids and at ids beyond the tokenizer's,
            which thus get no probability, whether the head is cut to the tokenizer's length (LLaDA-V) or not. The mask
            keeps its logit unless it is banned, but is never written
    best:   (B, L) their argmax over the ids that may be written; elsewhere the input tokens
    """

    where: Tensor
    logits: Tensor
    best: Tensor

    def at(self, positions: Tensor) -> Tensor:
        """(M, V), a copy: logits at the M true positions of `positions` (B, L), which must lie within `where`."""
        return self.logits[positions[self.where]]

    def confidence(self, positions: Tensor, tokens: Tensor, score: str = "probability") -> Tensor:
        """(B, L) float64 probability, or another score, of `tokens` (B, L) where `positions` is true; 0 elsewhere."""
        out = torch.zeros(positions.shape, dtype=torch.float64, device=positions.device)
        if positions.any():
            out[positions] = SCORES[score](self.logits, positions[self.where].nonzero()[:, 0], tokens[positions])
        return out


@dataclass
class DraftPrediction(Prediction):
    """A prediction that further forward calls update, and the draft (B, L) that these calls read."""

    draft: Tensor

    @classmethod
    def copy_of(cls, prediction: Prediction, draft: Tensor) -> DraftPrediction:
        """A copy whose logits may be changed without changing those of `prediction`."""
        return cls(**{**vars(prediction), "logits": prediction.logits.clone()}, draft=draft)

    def update(self, predict: Predictor, where: Tensor) -> None:
        """One forward call with the draft, for the true positions of `where` (B, L)."""
        fresh = predict(self.draft, where)
        self.logits[where[self.where]] = fresh.logits
        self.best = torch.where(where, fresh.best, self.best)


class Predictor:
    """Makes forward calls and counts them per row in `forwards` (B,). Never proposes a banned id or the mask.

    cost: forward calls of one prediction of a row: two with guidance, the second behind a prefix that is all masks

    Raises ValueError if suffix is not one-dimensional.
    NOTE: float32 logits of the backbone are changed in place, since a copy may take gigabytes.
    """

    def __init__(
        self, backbone: Backbone, prefix: Prefix, special: SpecialIds, *, cfg_scale: float, suffix: Tensor | None
    ) -> None:
        self.backbone, self.special, self.scale = backbone, special, cfg_scale
        self.prefixes = [prefix, masked_prefix(backbone, prefix, special)] if self.scale else [prefix]
        self.cost, device = len(self.prefixes), prefix.embeds.device
        self.forwards = torch.zeros(len(prefix.embeds), dtype=torch.int64, device=device)
        self.banned = torch.tensor(special.banned, dtype=torch.int64, device=device)
        if suffix is not None and suffix.ndim != 1:
            raise ValueError(f"suffix must be one row of ids, (S,), got shape {tuple(suffix.shape)}")
        self.suffix = torch.tensor([] if suffix is None else suffix.tolist(), dtype=torch.int64, device=device)
        self.rows, self.row_prefixes = torch.arange(len(self.forwards), device=device), self.prefixes
        self.cached: Prediction | None = None

    def __call__(self, tokens: Tensor, where: Tensor) -> Prediction:
        """Logits and argmax at the true positions of `where` (B, L): one call for each row that has any."""
        needed, best = where.any(1), tokens.clone()
        self.forwards = self.forwards + needed * self.cost
        rows = needed.nonzero()[:, 0]
        if not len(rows):
            return Prediction(where, torch.zeros(0, self.special.vocab_size, device=tokens.device), best)
        if not torch.equal(rows, self.rows):
            self.rows, self.row_prefixes = rows, [prefix.select(rows) for prefix in self.prefixes]
        suffix = self.suffix.expand(len(rows), -1)  # (n, S)
        texts, positions = torch.cat([tokens[rows], suffix], 1), F.pad(where[rows], (0, len(self.suffix)))  # (n, L + S)
        logits = self.backbone(self.row_prefixes[0], texts, positions=positions).float()  # (N, V)
        if self.scale:
            uncond = self.backbone(self.row_prefixes[1], texts, positions=positions).float()
            logits.sub_(uncond).mul_(self.scale + 1).add_(uncond)
        logits[:, self.banned] = -torch.inf
        logits[:, self.special.vocab_size :] = -torch.inf
        mask_logits = logits[:, self.special.mask].clone()
        logits[:, self.special.mask] = -torch.inf  # restored below: cheaper than a copy of all logits
        best[where] = logits.argmax(-1)
        logits[:, self.special.mask] = mask_logits
        return Prediction(where, logits, best)

    def keep(self, prediction: Prediction, rows: Tensor) -> None:
        """Cache the prediction for `rows` (B,) bool, whose tokens the step left unchanged."""
        where = prediction.where & rows[:, None]
        if not where.any():
            self.cached = None  # NOTE: logits are gigabytes; most steps change every row
        elif torch.equal(where, prediction.where):
            self.cached = prediction
        else:
            self.cached = Prediction(where, prediction.at(where), prediction.best)

    def reuse(self, tokens: Tensor, where: Tensor) -> Prediction:
        """Like `__call__`; rows whose `where` the cached logits cover cost no forward call. Empties the cache."""
        cached, self.cached = self.cached, None
        if cached is None:
            return self(tokens, where)
        hits = where & (cached.where.any(1) & ~(where & ~cached.where).any(1))[:, None]  # (B, L)
        fresh = self(tokens, where & ~hits)
        if not len(fresh.logits):
            return Prediction(where, cached.at(hits), torch.where(hits, cached.best, tokens))
        logits = fresh.logits.new_empty(int(where.sum()), fresh.logits.shape[1])
        logits[hits[where]], logits[~hits[where]] = cached.at(hits), fresh.logits
        return Prediction(where, logits, torch.where(hits, cached.best, fresh.best))


def masked_prefix(backbone: Backbone, prefix: Prefix, special: SpecialIds) -> Prefix:
    """The unconditional prefix for guidance: of the same lengths, with a mask at every position, images included."""
    device = prefix.embeds.device
    inputs = {"prompt_ids": torch.full(prefix.embeds.shape[:2], special.mask, dtype=torch.int64, device=device)}
    if prefix.mask is not None:
        inputs["prompt_mask"] = prefix.mask
    return backbone.encode_prefix(inputs)
