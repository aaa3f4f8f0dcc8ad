"""Recovery: wrong tokens are planted in true texts, and a sampler corrects the whole text, as `src.generate caption=`.

    recovery = Recovery(special=codec.special, sampler=Sampler(..., reviser=OverwriteAll(), post_steps=1))
    recovery.update(backbone, batch)      for each batch
    recovery.compute()                    {"repaired by wrong tokens=1": {mean, se, n}, "broken by ...": ..., ...}

B rows, L response positions. `repaired`: share of the planted tokens that are true again; `broken`: share of the other
tokens of the text, its eot included, that are no longer true. Planted are some random tokens at random places of each
text, or `a fact`: one of the false versions that the data have of it (a swap), as a user would get a caption wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from src.diffusion.corruption import Replace, Span, start, text_positions
from src.diffusion.noise import Noise
from src.metrics.caption import Stat
from src.types import Backbone, Batch, SpecialIds

FACT = "a fact"


class Recovery(Metric):
    """Shares over all responses, without an error.

    sampler: one with post steps, whose length is that of the responses
    wrong: numbers of random tokens planted; a shorter text gets as many as it has
    """

    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(
        self, *, special: SpecialIds, sampler: Any, wrong: Sequence[int] = (1, 2, 4, 8), seed: int = 0
    ) -> None:
        super().__init__()
        self.special, self.sampler, self.wrong, self.seed = special, sampler, [*wrong], seed
        self.add_state("counts", torch.zeros(len(wrong) + 1, 4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, backbone: Backbone, batch: Batch) -> None:
        prefix, noise = backbone.encode_prefix(batch.prefix), Noise(batch.keys, seed=self.seed, draw="recovery")
        text = text_positions(batch.response, self.special.eot)  # (B, L)
        # 1. Texts with mistakes: the first n places of a random order get a random token; or a false fact.
        words = text & (batch.response != self.special.eot)
        rank = noise.uniform(words).masked_fill(~words, 2.0).argsort(1).argsort(1)  # other positions come last
        random = Replace(special=self.special, rate=1.0).draw(batch, noise)
        texts = [torch.where(words & (rank < n), random, batch.response) for n in self.wrong]
        rate = torch.zeros(len(batch), device=text.device)
        texts.append(Span(num=1)(batch, start(batch, rate), noise).tokens)
        # 2. What the sampler makes of them.
        for row, flawed in enumerate(texts):
            settings = {"special": self.special, "keys": batch.keys, "seed": self.seed}
            ids = self.sampler(backbone, prefix, start=flawed, **settings).ids
            wrong, true = flawed != batch.response, ids == batch.response
            right = text & ~wrong
            self.counts[row] += torch.stack([m.sum() for m in (wrong & true, wrong, right & ~true, right)])

    def compute(self) -> dict[str, Stat]:
        repaired, broken = {}, {}
        for name, (fixed, wrong, changed, right) in zip([*self.wrong, FACT], self.counts.tolist(), strict=True):
            share = fixed / wrong if wrong else math.nan
            repaired[f"repaired by wrong tokens={name}"] = Stat(mean=share, se=None, n=int(wrong))
            share = changed / right if right else math.nan
            broken[f"broken by wrong tokens={name}"] = Stat(mean=share, se=None, n=int(right))
        return {**repaired, **broken}
