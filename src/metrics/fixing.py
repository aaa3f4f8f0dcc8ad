"""P(fix) and P(break): what one forward call of a model changes in texts that are given to it.

    count_fixes(backbone, batches, special=...)                     on drafts that an expert has corrected
    count_looks(backbone, batches, special=..., levels=[0, 0.5])    on true texts, by the share of masked tokens

P(fix): share of the wrong tokens that it corrects. P(break): share of the right tokens that it changes. Predictions are
the argmax over the ids that a sampler may write; the filler behind a text does not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from src.diffusion.corruption import Absorb, Replace, start, text_positions
from src.diffusion.noise import Noise
from src.metrics.caption import Stat
from src.types import Backbone, Batch, Kind, Prefix, SpecialIds


@torch.no_grad()
def count_fixes(
    backbone: Backbone, batches: Iterable[Batch], *, special: SpecialIds, device: torch.device | str = "cpu"
) -> Tensor:
    """Counts (4,) float64: corrected wrong tokens, wrong tokens, changed right tokens, right tokens.

    batches: corrected drafts, in which `flawed` is the draft and `response` its correction
    """
    counts = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        predicted = _predict(backbone, backbone.encode_prefix(batch.prefix), batch.flawed, special)
        wrong = batch.flawed != batch.response
        right = batch.editable & ~wrong & (batch.response != special.eos)
        fixed, broken = wrong & (predicted == batch.response), right & (predicted != batch.flawed)
        counts += torch.stack([mask.sum() for mask in (fixed, wrong, broken, right)])
    return counts


@torch.no_grad()
def count_looks(
    backbone: Backbone,
    batches: Iterable[Batch],
    *,
    special: SpecialIds,
    levels: Sequence[float],
    rate: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Counts (levels, 4) as of `count_fixes`, with each token masked with probability `level`.

    Right tokens are those of true texts that are still visible; wrong ones, in a forward call of their own, the share
    `rate` of these that is replaced by random tokens.
    """
    counts = torch.zeros(len(levels), 4, dtype=torch.float64, device=device)
    absorb, replace = Absorb(special=special), Replace(special=special, rate=rate)
    for batch in batches:
        batch = batch.to(device)
        prefix = backbone.encode_prefix(batch.prefix)
        for row, level in enumerate(map(float, levels)):
            noise = Noise(batch.keys, seed=seed, draw=f"look/{level}")
            masked = absorb(batch, start(batch, torch.full((len(batch),), level, device=device)), noise)
            right = masked.where(Kind.CLEAN) & text_positions(batch.response, special.eot)
            broken = right & (_predict(backbone, prefix, masked.tokens, special) != batch.response)
            flawed = replace(batch, masked, noise)
            wrong = flawed.where(Kind.SYNTAX)
            fixed = wrong & (_predict(backbone, prefix, flawed.tokens, special) == batch.response)
            counts[row] += torch.stack([mask.sum() for mask in (fixed, wrong, broken, right)])
    return counts


def _predict(backbone: Backbone, prefix: Prefix, tokens: Tensor, special: SpecialIds) -> Tensor:
    """(B, L) the ids that one forward call finds most likely."""
    logits = backbone(prefix, tokens)  # (B, L, V)
    return special.argmax(logits.flatten(0, 1)).view_as(tokens)


class Looks(Metric):
    """Shares of `count_looks` over all responses: `p_fix at t=LEVEL` and `p_break at t=LEVEL`, without an error."""

    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self, *, special: SpecialIds, levels: Sequence[float], rate: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        self.settings = {"special": special, "levels": list(levels), "rate": rate, "seed": seed}
        self.add_state("counts", torch.zeros(len(levels), 4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, backbone: Backbone, batch: Batch) -> None:
        self.counts += count_looks(backbone, [batch], device=self.counts.device, **self.settings)

    def compute(self) -> dict[str, Stat]:
        fix, break_ = {}, {}
        for level, (fixed, wrong, broken, right) in zip(self.settings["levels"], self.counts.tolist(), strict=True):
            fix[f"p_fix at t={level:g}"] = Stat(mean=fixed / wrong if wrong else math.nan, se=None, n=int(wrong))
            break_[f"p_break at t={level:g}"] = Stat(mean=broken / right if right else math.nan, se=None, n=int(right))
        return {**fix, **break_}
