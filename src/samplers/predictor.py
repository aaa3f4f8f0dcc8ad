"""Forward calls of a sampler: rows that ask for something, guided, counted, and not repeated for what is known.

    predict = Predictor(backbone, prefix, special, cfg_scale=0.0, suffix=None)
    prediction = predict(tokens, where)     one call for each row that has a true place in `where`
    predict.keep(prediction, unchanged)     the tokens of these rows stay as they are:
    prediction = predict.next(tokens, ...)  no call for them, if nothing is asked that was not before

B rows, L response positions, N asked positions, S suffix positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from src.samplers.reviser import Prediction
from src.types import Backbone, Prefix, SpecialIds


class Predictor:
    """Forward calls for the rows that ask for something; counts them per row, never proposes a banned id or the mask.

    The logits that a backbone returns are changed in place where they are float32 already: a copy may take gigabytes.
    prefixes: what the calls of a step are made behind: the prefix and, for guidance, one that is all masks.
    """

    def __init__(
        self, backbone: Backbone, prefix: Prefix, special: SpecialIds, *, cfg_scale: float, suffix: Tensor | None
    ) -> None:
        self.backbone, self.special, self.scale = backbone, special, cfg_scale
        self.prefixes = [prefix, hidden_prefix(backbone, prefix, special)] if self.scale else [prefix]
        device = prefix.embeds.device
        self.forwards = torch.zeros(prefix.embeds.shape[0], dtype=torch.int64, device=device)
        self.banned = torch.tensor(special.banned, dtype=torch.int64, device=device)
        if suffix is not None and suffix.ndim != 1:
            raise ValueError(f"suffix must be one row of ids, (S,), got shape {tuple(suffix.shape)}")
        self.suffix = torch.tensor([] if suffix is None else suffix.tolist(), dtype=torch.int64, device=device)
        self.rows, self.selected = torch.arange(len(self.forwards), device=device), self.prefixes
        self.kept: Prediction | None = None

    def __call__(self, tokens: Tensor, where: Tensor) -> Prediction:
        """Logits and argmax at the true places of `where` (B, L)."""
        asked = where.any(1)
        self.forwards = self.forwards + asked * len(self.prefixes)
        rows = asked.nonzero()[:, 0]
        if not len(rows):
            return Prediction(where, torch.zeros(0, self.special.vocab_size, device=tokens.device), tokens.clone())
        logits = self._logits(rows, tokens[rows], where[rows])  # (N, V)
        logits[:, self.banned] = -torch.inf
        logits[:, self.special.vocab_size :] = -torch.inf
        best = tokens.clone()
        best[where] = argmax_without(logits, self.special.mask)
        return Prediction(where, logits, best)

    def keep(self, prediction: Prediction, rows: Tensor) -> None:
        """Remember what was said about `rows` (B,) bool, whose tokens the step has left as they were."""
        where = prediction.where & rows[:, None]
        if not where.any():
            self.kept = None  # NOTE: logits are gigabytes; most steps change every row
        elif torch.equal(where, prediction.where):
            self.kept = prediction
        else:
            self.kept = Prediction(where, prediction.at(where), prediction.best)

    def next(self, tokens: Tensor, where: Tensor) -> Prediction:
        """The same as a call; rows that were kept, and ask for nothing else, are not sent to the backbone again."""
        kept, self.kept = self.kept, None
        if kept is None:
            return self(tokens, where)
        known = where & (kept.where.any(1) & ~(where & ~kept.where).any(1))[:, None]  # (B, L)
        found = self(tokens, where & ~known)
        if not len(found.logits):
            return Prediction(where, kept.at(known), torch.where(known, kept.best, tokens))
        logits = found.logits.new_empty(int(where.sum()), found.logits.shape[1])
        logits[known[where]], logits[~known[where]] = kept.at(known), found.logits
        return Prediction(where, logits, torch.where(known, kept.best, found.best))

    def _logits(self, rows: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
        """(N, V) float32 logits of some rows in sight of the suffix, guided if asked for."""
        if not torch.equal(rows, self.rows):
            self.rows, self.selected = rows, [prefix.select(rows) for prefix in self.prefixes]
        suffix = self.suffix.expand(len(rows), -1)  # (n, S)
        tokens, where = torch.cat([tokens, suffix], 1), F.pad(where, (0, len(self.suffix)))  # (n, L + S)
        logits = [self.backbone(p, tokens, positions=where).float() for p in self.selected]
        if not self.scale:
            return logits[0]
        cond, uncond = logits
        return cond.sub_(uncond).mul_(self.scale + 1).add_(uncond)


def argmax_without(logits: Tensor, mask: int) -> Tensor:
    """(N,) argmax of logits (N, V) among the ids that are not `mask`."""
    kept = logits[:, mask].clone()
    logits[:, mask] = -torch.inf  # and back again: cheaper than a copy of all
    best = logits.argmax(-1)
    logits[:, mask] = kept
    return best


def hidden_prefix(backbone: Backbone, prefix: Prefix, special: SpecialIds) -> Prefix:
    """A prefix of the same lengths that tells nothing: the mask at every place, also where an image was."""
    device = prefix.embeds.device
    inputs = {"prompt_ids": torch.full(prefix.embeds.shape[:2], special.mask, dtype=torch.int64, device=device)}
    if prefix.mask is not None:
        inputs["prompt_mask"] = prefix.mask
    return backbone.encode_prefix(inputs)
