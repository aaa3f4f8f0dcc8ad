"""Forward calls of a sampler: only for rows that need logits, guided if asked for, counted, and reused.

B rows, L response positions, S suffix positions, n rows of a call, V vocabulary. Shapes do not depend on what the
tokens are: every call has the logits of all response positions of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from src.samplers.unmask import SCORES, log_probability
from src.types import Backbone, Prefix, SpecialIds


@dataclass
class Prediction:
    """What the backbone says of a response.

    where:    (B, L) bool, the positions that the step asks about; elsewhere, `best` holds the input tokens
    logits:   (B, L, V) float32. -inf at banned ids and at ids beyond the tokenizer's, which thus get no probability,
              whether the head is cut to the tokenizer's length (LLaDA-V) or not. The mask keeps its logit unless it is
              banned, but is never written
    best:     (B, L) their argmax over the ids that may be written
    peak:     (B, L) float32, the logit of that argmax; log_prob: (B, L) float64, its log-probability
    """

    where: Tensor
    logits: Tensor
    best: Tensor
    peak: Tensor
    log_prob: Tensor

    def confidence(self, positions: Tensor, tokens: Tensor, score: str = "probability") -> Tensor:
        """(B, L) float64 probability, or another score, of `tokens` (B, L) where `positions` is true; 0 elsewhere."""
        if score == "probability":  # 0 - log(sum) is exact where the probability is near 1, unlike logit - log(sum)
            lead = self.logits.gather(-1, tokens[..., None])[..., 0].double() - self.peak
            values = (lead + self.log_prob).exp()
        else:
            values = SCORES[score](self.logits.flatten(0, 1)).view_as(self.log_prob)
        return torch.where(positions, values, 0.0)


@dataclass
class DraftPrediction(Prediction):
    """A prediction that further forward calls update, and the draft (B, L) that these calls read."""

    draft: Tensor

    @classmethod
    def of(cls, prediction: Prediction, draft: Tensor) -> DraftPrediction:
        return cls(**vars(prediction), draft=draft)

    def update(self, predict: Predictor, rows: list[int]) -> None:
        """One forward call with the draft for each true one of `rows`. Leaves the prediction it came from as it is."""
        fresh = predict.again(self, self.draft, rows)
        self.logits, self.best, self.peak, self.log_prob = fresh.logits, fresh.best, fresh.peak, fresh.log_prob


class Predictor:
    """Makes forward calls and counts them per row in `forwards` (B,). Never proposes a banned id or the mask.

    length: of the response, L
    cost: forward calls of one prediction of a row: two with guidance, the second behind a prefix that is all masks

    A prefix with keys and values gets room for the response behind them, and its rows change places in there so that
    those of a call come first; `release` puts them back. Raises ValueError if suffix is not one-dimensional.
    NOTE: float32 logits of the backbone are changed in place, since a copy may take gigabytes.
    """

    def __init__(
        self,
        backbone: Backbone,
        prefix: Prefix,
        special: SpecialIds,
        *,
        length: int,
        cfg_scale: float,
        suffix: Tensor | None,
    ) -> None:
        self.backbone, self.special, self.length, self.scale = backbone, special, length, cfg_scale
        self.prefixes = [prefix, masked_prefix(backbone, prefix, special)] if self.scale else [prefix]
        self.cost, device, num_rows = len(self.prefixes), prefix.embeds.device, len(prefix.embeds)
        self.forwards = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.banned = torch.tensor(special.banned, dtype=torch.int64, device=device)
        if suffix is not None and suffix.ndim != 1:
            raise ValueError(f"suffix must be one row of ids, (S,), got shape {tuple(suffix.shape)}")
        suffix = torch.zeros(0, dtype=torch.int64) if suffix is None else suffix
        self.suffix = suffix.to(device=device, dtype=torch.int64)
        for behind in self.prefixes:
            behind.reserve(length + len(suffix))
        self.order, self.num_rows = list(range(num_rows)), num_rows  # rows of the prefixes; how many are in the call
        self.rows: Tensor | None = None  # (n,) those of the call, None if all
        self.called = self.prefixes
        self.latest: Prediction | None = None  # of the texts (B, L) `read`; -1 where a row was never asked about
        self.read = torch.full((num_rows, length), -1, dtype=torch.int64, device=device)

    def known(self, tokens: Tensor) -> Tensor:
        """(B,) bool: rows of `tokens` (B, L) that `first` has read last; the backbone gets no time, so it would say
        the same again."""
        return (self.read == tokens).all(1)

    def first(self, tokens: Tensor, where: Tensor, rows: list[int]) -> Prediction:
        """The prediction of a step: one forward call for each true one of `rows`, what is known of the others."""
        if any(rows):
            if all(rows):
                self.latest = None  # frees its logits before there are new ones
            self.latest = self._call(tokens, rows, self.latest, in_place=True)
            self.read = tokens if self.rows is None else self.read.index_copy(0, self.rows, tokens[self.rows])
        assert self.latest is not None
        return replace(self.latest, where=where, best=torch.where(where, self.latest.best, tokens))

    def again(self, prediction: Prediction, draft: Tensor, rows: list[int]) -> Prediction:
        """A new prediction, of `draft` (B, L): one further forward call for each true one of `rows`."""
        if not any(rows):
            return prediction
        fresh = self._call(draft, rows, prediction, in_place=False)
        return replace(fresh, where=prediction.where, best=torch.where(prediction.where, fresh.best, draft))

    def _call(self, tokens: Tensor, rows: list[int], old: Prediction | None, *, in_place: bool) -> Prediction:
        self._arrange([row for row, is_called in enumerate(rows) if is_called])
        texts = tokens if self.rows is None else tokens[self.rows]  # (n, L)
        texts = torch.cat([texts, self.suffix.expand(len(texts), -1)], 1) if len(self.suffix) else texts
        logits = self.backbone(self.called[0], texts).float()[:, : self.length]  # (n, L, V)
        if self.scale:
            uncond = self.backbone(self.called[1], texts).float()[:, : self.length]
            logits.sub_(uncond).mul_(self.scale + 1).add_(uncond)
        logits.index_fill_(-1, self.banned, -torch.inf)
        logits[..., self.special.vocab_size :] = -torch.inf
        mask_logits = logits[..., self.special.mask].clone()
        logits[..., self.special.mask] = -torch.inf  # restored below: cheaper than a copy of all logits
        best = logits.argmax(-1)
        logits[..., self.special.mask] = mask_logits
        peak = logits.gather(-1, best[..., None])[..., 0]
        fresh = (logits, best, peak, log_probability(logits.flatten(0, 1), best.flatten()).view_as(peak))
        where = torch.ones_like(tokens, dtype=torch.bool)
        if self.rows is None:
            self.forwards = self.forwards + self.cost
            return Prediction(where, *fresh)
        self.forwards = self.forwards.index_add(0, self.rows, torch.full_like(self.rows, self.cost))
        if old is None:
            blank = [part.new_zeros(len(tokens), *part.shape[1:]) for part in fresh]
        else:
            blank = [old.logits, old.best, old.peak, old.log_prob]
        if not in_place:
            blank = [part.clone() for part in blank]
        return Prediction(where, *(part.index_copy_(0, self.rows, new) for part, new in zip(blank, fresh, strict=True)))

    def _arrange(self, rows: list[int]) -> None:
        """Bring `rows` to the front of the prefixes; if these are all, into their order."""
        wanted, count = set(rows), len(rows)
        if count == self.num_rows and set(self.order[:count]) == wanted:
            return
        if count == len(self.order):
            self.release()
            return
        free = [slot for slot in range(count) if self.order[slot] not in wanted]
        for slot in range(count, len(self.order)):
            if self.order[slot] in wanted:
                self._swap(slot, free.pop())
        self.num_rows = count
        self.rows = torch.tensor(self.order[:count]).to(self.forwards.device, non_blocking=True)
        self.called = [prefix.first(self.rows) for prefix in self.prefixes]

    def _swap(self, a: int, b: int) -> None:
        self.order[a], self.order[b] = self.order[b], self.order[a]
        for prefix in self.prefixes:
            prefix.swap(a, b)

    def release(self) -> None:
        """Put the rows of the prefixes back into their order."""
        for slot in range(len(self.order)):
            while self.order[slot] != slot:
                self._swap(slot, self.order[slot])
        self.rows, self.called, self.num_rows = None, self.prefixes, len(self.order)


def read(*values: Tensor) -> list[list[int]]:
    """Flags or numbers (B,) on the host. Where a sampler waits for the device, it does so here."""
    return torch.stack([value.long() for value in values]).tolist()


def masked_prefix(backbone: Backbone, prefix: Prefix, special: SpecialIds) -> Prefix:
    """The unconditional prefix for guidance: of the same lengths, with a mask at every position, images included."""
    device = prefix.embeds.device
    inputs = {"prompt_ids": torch.full(prefix.embeds.shape[:2], special.mask, dtype=torch.int64, device=device)}
    if prefix.mask is not None:
        inputs["prompt_mask"] = prefix.mask
    return backbone.encode_prefix(inputs)
