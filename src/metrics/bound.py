"""NELBO of a masked diffusion model: an upper bound on the negative log-likelihood of a response, in nats.

    bound = Bound(special=codec.special, draws=32, seed=0)
    bound.update(backbone, batch)      for each batch
    bound.compute()                    {"nelbo", "perplexity", "bits"}: {mean, se, n}

B rows, L positions, V vocabulary, n editable positions of a row (text, eot, and editable end-of-text filler).

    nats = E[ n/k * sum of the cross-entropies at k masked tokens ],   k uniform on 1..n, then a uniform set of k tokens

This equals the continuous-time NELBO of the linear schedule, 1/t times the masked cross-entropy with t uniform on
[0, 1]: the integral over t gives each set of k tokens the same weight (LLaDA, arXiv 2502.09992, eq. 6). Drawing k
instead of t, stratified over the draws of a response, has a far smaller variance.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.metrics.caption import Stat, ratio_stat
from src.types import Backbone, Batch, SpecialIds

Estimator = Literal["count", "iid"]
LEAST = 1e-3  # minimum t of the estimator `iid`, as in LLaDA's training: from 0 on, 1/t has no finite variance


def response_nats(
    backbone: Backbone, batch: Batch, *, special: SpecialIds, draws: int, seed: int, estimator: Estimator = "count"
) -> Tensor:
    """Estimated bound of each response in nats, (B,) float64; 0 if nothing is editable.

    A pure function of (seed, key, draw) and the response, independent of the rest of the batch.

    estimator: `count`, as above; `iid`: t uniform on [0.001, 1], each token masked with probability t, weight 1/t
    """
    prefix = backbone.encode_prefix(batch.prefix)
    attend = None if bool(batch.editable.all()) else batch.editable
    offset = Noise(batch.keys, seed=seed, draw="bound").level(device=batch.response.device).double()
    total = torch.zeros_like(offset)
    for draw in range(draws):
        # 1. Which tokens to mask, (B, L) bool, and the weight of their cross-entropies, (B,).
        noise = Noise(batch.keys, seed=seed, draw=f"bound/{draw}")
        if estimator == "count":
            masked, weight = hide_count(batch.editable, noise, (offset + draw) / draws)
        else:
            t = noise.level(LEAST, device=batch.editable.device)
            masked, weight = batch.editable & (noise.uniform(batch.editable) < t[:, None]), 1 / t.double()
        # 2. Cross-entropies there, over all ids of the tokenizer but the mask.
        tokens = batch.response.masked_fill(masked, special.mask)
        logits = backbone(prefix, tokens, attend=attend, positions=masked).float()  # (N, V)
        logits[:, special.mask] = -torch.inf
        logits[:, special.vocab_size :] = -torch.inf
        nats = torch.zeros(masked.shape, dtype=torch.float64, device=masked.device)
        nats[masked] = F.cross_entropy(logits, batch.response[masked], reduction="none").double()
        total += weight * nats.sum(1)
    return total / draws


def hide_count(editable: Tensor, noise: Noise, quantile: Tensor) -> tuple[Tensor, Tensor]:
    """Mask k = floor(quantile * n) + 1 editable tokens of each row: masked (B, L) bool, weight n/k (B,) float64.

    quantile: (B,) float64 within [0, 1); if it is uniform, k is uniform on 1..n
    """
    n = editable.sum(1)
    k = ((quantile * n).long() + 1).minimum(n)
    order = noise.uniform(editable).masked_fill(~editable, torch.inf).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)
    return editable & (rank < k[:, None]), n.double() / k.clamp(min=1)


class NatsPerToken(Metric):
    """Base: mean of nats over all tokens of all texts, with the standard error of a ratio of means over texts."""

    is_differentiable = False
    full_state_update = False
    higher_is_better = False
    sums: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")  # s, n, s^2, sn, n^2
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, nats: Tensor, tokens: Tensor) -> None:
        """Add texts: of each the sum of its nats (B,) float64, and the number of its tokens (B,)."""
        nats, tokens = nats.to(self.sums.device), tokens.to(self.sums)
        self.sums += torch.stack([nats, tokens, nats**2, nats * tokens, tokens**2]).sum(1)
        self.count += len(nats)

    def per_token(self) -> Stat:
        """Sum of all nats divided by the number of all tokens; `n` counts texts. Raises ValueError without tokens."""
        return ratio_stat(self.sums.tolist(), int(self.count))


def perplexity_of(nats: Stat) -> Stat:
    """exp of a mean of nats per token, its standard error by the delta method."""
    return scaled(nats, math.exp(nats["mean"]), math.exp(nats["mean"]))


def scaled(stat: Stat, mean: float, factor: float) -> Stat:
    """The statistic with another mean, its standard error times `factor`."""
    return Stat(mean=mean, se=None if stat["se"] is None else stat["se"] * factor, n=stat["n"])


class Bound(NatsPerToken):
    """Bound per token over all responses: `nelbo` in nats, `bits`, and `perplexity` = exp(nelbo)."""

    def __init__(self, *, special: SpecialIds, draws: int, seed: int = 0, estimator: Estimator = "count") -> None:
        super().__init__()
        if draws < 1:
            raise UserError(f"draws must be at least 1, got {draws}")
        self.settings = {"special": special, "draws": draws, "seed": seed, "estimator": estimator}

    def update(self, backbone: Backbone, batch: Batch) -> None:
        self.add(response_nats(backbone, batch, **self.settings), batch.editable.sum(1))

    def compute(self) -> dict[str, Stat]:
        nelbo, bit = self.per_token(), 1 / math.log(2)
        return {"nelbo": nelbo, "bits": scaled(nelbo, nelbo["mean"] * bit, bit), "perplexity": perplexity_of(nelbo)}
