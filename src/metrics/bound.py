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
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.metrics.caption import Stat, ratio_stat
from src.types import Backbone, Batch, Prefix, SpecialIds

Estimator = Literal["count", "iid"]
LEAST = 1e-3  # minimum t of the estimator `iid`, as in LLaDA's training: from 0 on, 1/t has no finite variance


def response_nats(
    backbone: Backbone, batch: Batch, *, special: SpecialIds, draws: int, seed: int, estimator: Estimator = "count"
) -> Tensor:
    """Estimated bound of each response in nats, (B,) float64; 0 if nothing is editable.

    estimator: `count`, as above; `iid`: t uniform on [0.001, 1], each token masked with probability t, weight 1/t

    A pure function of (seed, key, draw) and the response, independent of the rest of the batch.
    """
    prefix = backbone.encode_prefix(batch.prefix)
    offset = Noise(batch.keys, seed=seed, draw="bound").level(device=batch.response.device).double()
    total = torch.zeros_like(offset)
    for draw in range(draws):
        noise = Noise(batch.keys, seed=seed, draw=f"bound/{draw}")
        if estimator == "count":
            masked, weight = hide_count(batch.editable, noise, (offset + draw) / draws)
        else:
            masked, weight = hide_iid(batch.editable, noise)
        total += weight * _masked_nats(backbone, prefix, batch, masked, special)
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


def hide_iid(editable: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """Mask each editable token with probability t: masked (B, L) bool, weight 1/t (B,) float64."""
    t = noise.level(LEAST, device=editable.device)
    return editable & (noise.uniform(editable) < t[:, None]), 1 / t.double()


def _masked_nats(backbone: Backbone, prefix: Prefix, batch: Batch, masked: Tensor, special: SpecialIds) -> Tensor:
    """Sum of the cross-entropies at the masked positions, over all ids of the tokenizer but the mask: (B,) float64."""
    attend = None if bool(batch.editable.all()) else batch.editable
    tokens = batch.response.masked_fill(masked, special.mask)
    logits = backbone(prefix, tokens, attend=attend, positions=masked).float()  # (N, V)
    logits[:, special.mask] = -torch.inf
    logits[:, special.vocab_size :] = -torch.inf
    nats = torch.zeros(masked.shape, dtype=torch.float64, device=masked.device)
    nats[masked] = F.cross_entropy(logits, batch.response[masked], reduction="none").double()
    return nats.sum(1)


class Bound(Metric):
    """Bound per token over all responses: `nelbo` in nats, `bits`, and `perplexity` = exp(nelbo).

    The mean is the sum of all bounds divided by the number of all tokens. Standard errors are those of a ratio of means
    over responses; that of the perplexity follows by the delta method. States are sums.

    Raises UserError for draws below 1, or an unknown estimator.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False
    sums: Tensor
    count: Tensor

    def __init__(self, *, special: SpecialIds, draws: int, seed: int = 0, estimator: Estimator = "count") -> None:
        super().__init__()
        if draws < 1:
            raise UserError(f"draws must be at least 1, got {draws}")
        if estimator not in get_args(Estimator):
            raise UserError(f"estimator must be one of {', '.join(get_args(Estimator))}, got {estimator!r}")
        self.special, self.draws, self.seed, self.estimator = special, draws, seed, estimator
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")  # s, n, s^2, sn, n^2
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, backbone: Backbone, batch: Batch) -> None:
        """Add the responses of a batch."""
        settings = {"draws": self.draws, "seed": self.seed, "estimator": self.estimator}
        nats = response_nats(backbone, batch, special=self.special, **settings).to(self.sums.device)
        tokens = batch.editable.sum(1).to(nats)
        self.sums += torch.stack([nats, tokens, nats**2, nats * tokens, tokens**2]).sum(1)
        self.count += len(batch)

    def compute(self) -> dict[str, Stat]:
        """Statistics by name; `n` counts responses."""
        nelbo = ratio_stat(self.sums.tolist(), int(self.count))
        factors = {"nelbo": 1.0, "bits": 1 / math.log(2)}
        stats = {name: _scaled(nelbo, nelbo["mean"] * factor, factor) for name, factor in factors.items()}
        perplexity = math.exp(nelbo["mean"])
        return {**stats, "perplexity": _scaled(nelbo, perplexity, perplexity)}


def _scaled(stat: Stat, mean: float, factor: float) -> Stat:
    """The statistic with another mean, its standard error times `factor`."""
    return Stat(mean=mean, se=None if stat["se"] is None else stat["se"] * factor, n=stat["n"])
