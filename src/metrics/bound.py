"""The validation bound: an upper bound on how many nats a masked diffusion model needs for a response (NELBO).

    bound = Bound(special=codec.special, draws=32, seed=0)
    bound.update(backbone, batch)      for each batch
    bound.compute()                    {"nelbo", "perplexity", "bits"}: {mean, se, n}

B rows, L positions, V vocabulary, n editable positions of a row (text, eot, and end-of-text filler that is editable).

    nats = E[ n/k * sum of the cross-entropies at k hidden tokens ],   k uniform on 1..n, then which k uniform

is the continuous-time NELBO of the linear schedule, 1/t times the masked cross-entropy with t uniform on [0, 1]:
the integral over t gives each set of k tokens the same weight (LLaDA, arXiv 2502.09992, eq. 6). Drawing the number k
in place of t, stratified over the draws of a response, has a far smaller variance.
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
from src.metrics.caption import Stat
from src.types import Backbone, Batch, Prefix, SpecialIds

Estimator = Literal["count", "iid"]
LEAST = 1e-3  # t of the plain estimator, as in LLaDA's training: 1/t would have no finite variance from 0 on


def response_nats(
    backbone: Backbone, batch: Batch, *, special: SpecialIds, draws: int, seed: int, estimator: Estimator = "count"
) -> Tensor:
    """(B,) float64: the estimated bound of each response, in nats; 0 where nothing is editable.

    estimator: `count`, or `iid`: t uniform on [0.001, 1] and every token hidden with probability t, weight 1/t. A pure
    function of (seed, key, draw) and the response, whatever else is in the batch.
    """
    prefix = backbone.encode_prefix(batch.prefix)
    offset = Noise(batch.keys, seed=seed, draw="bound").level(device=batch.response.device).double()
    total = torch.zeros_like(offset)
    for draw in range(draws):
        noise = Noise(batch.keys, seed=seed, draw=f"bound/{draw}")
        if estimator == "count":
            hidden, weight = hide_count(batch.editable, noise, (offset + draw) / draws)
        else:
            hidden, weight = hide_iid(batch.editable, noise)
        total += weight * _masked_nats(backbone, prefix, batch, hidden, special)
    return total / draws


def hide_count(editable: Tensor, noise: Noise, place: Tensor) -> tuple[Tensor, Tensor]:
    """Hide k = floor(place * n) + 1 editable tokens of each row: (B, L) bool, and the weight n/k (B,) float64.

    place: (B,) float64 within [0, 1); uniform over it, k is uniform on 1..n
    """
    n = editable.sum(1)
    k = ((place * n).long() + 1).minimum(n)
    order = noise.uniform(editable).masked_fill(~editable, torch.inf).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)
    return editable & (rank < k[:, None]), n.double() / k.clamp(min=1)


def hide_iid(editable: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """Hide each editable token with probability t: (B, L) bool, and the weight 1/t (B,) float64."""
    t = noise.level(LEAST, device=editable.device)
    return editable & (noise.uniform(editable) < t[:, None]), 1 / t.double()


def _masked_nats(backbone: Backbone, prefix: Prefix, batch: Batch, hidden: Tensor, special: SpecialIds) -> Tensor:
    """(B,) float64: the summed cross-entropy at the hidden places, among all ids of the tokenizer but the mask."""
    attend = None if bool(batch.editable.all()) else batch.editable
    tokens = batch.response.masked_fill(hidden, special.mask)
    logits = backbone(prefix, tokens, attend=attend, positions=hidden).float()  # (N, V)
    logits[:, special.mask] = -torch.inf
    logits[:, special.vocab_size :] = -torch.inf
    nats = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    nats[hidden] = F.cross_entropy(logits, batch.response[hidden], reduction="none").double()
    return nats.sum(1)


class Bound(Metric):
    """The bound per token over all responses: `nelbo` in nats, `bits`, and `perplexity` = exp(nelbo).

    The sum of all bounds over the number of all tokens; standard errors are those of a ratio of means over responses,
    by the delta method for the perplexity. States are sums. Raises UserError for draws below 1.
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
        scale = {"nelbo": 1.0, "bits": 1 / math.log(2)}
        found = {name: _scaled(nelbo, nelbo["mean"] * factor, factor) for name, factor in scale.items()}
        perplexity = math.exp(nelbo["mean"])
        return {**found, "perplexity": _scaled(nelbo, perplexity, perplexity)}


def ratio_stat(sums: list[float], count: int) -> Stat:
    """sum(s) / sum(n) and its linearised standard error from the sums of s, n, s^2, sn, n^2 over `count` texts."""
    s, n, ss, sn, nn = sums
    if not n:
        raise ValueError("no tokens were scored")
    ratio = s / n
    if count < 2:
        return Stat(mean=ratio, se=None, n=count)
    residual = max(0.0, ss - 2 * ratio * sn + ratio * ratio * nn) / (count - 1)
    return Stat(mean=ratio, se=math.sqrt(residual * count) / n, n=count)


def _scaled(stat: Stat, mean: float, factor: float) -> Stat:
    return Stat(mean=mean, se=None if stat["se"] is None else stat["se"] * factor, n=stat["n"])
