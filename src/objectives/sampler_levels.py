"""Stage I at the noise levels that a sampler visits. Ours, not from a paper.

Training draws t uniformly; a sampler at n tokens per step asks for the levels t_k = M_k / L alone, where L is the
response length, M_0 = L, and M_k masks are left before step k of its K_n. So:

    with probability `unmasked`       t = 0, a text without any mask, as a reviser's post steps see
    otherwise                         n uniform on `tokens_per_step`, k uniform on 0..K_n - 1, t = t_k

then as in `src.objectives.revision`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from src.io.errors import UserError
from src.objectives.base import Setup
from src.objectives.revision import RevisionObjective
from src.samplers.schedule import Schedule


class SamplerLevels(RevisionObjective):
    """`RevisionObjective` with other noise levels.

    tokens_per_step: speeds of the sampler; unmasked: share of the rows without masks; response_length: in tokens
    stage1: see `RevisionObjective`, which draws no level itself: t_min has no effect and cannot be set

    Raises UserError for no speed, one that `Schedule` refuses, or a share outside 0..1.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        response_length: int,
        tokens_per_step: Sequence[int] = (1, 2, 4, 8),
        unmasked: float = 0.1,
        **stage1: Any,
    ) -> None:
        if not tokens_per_step or "t_min" in stage1:
            raise UserError("tokens_per_step must name at least one speed; its levels leave no room for t_min")
        if not 0 <= unmasked <= 1:
            raise UserError(f"unmasked must be within 0..1, got {unmasked}")
        super().__init__(setup, **stage1)
        self.unmasked = unmasked
        schedules = [Schedule(length=response_length, tokens_per_step=n, steps=None) for n in tokens_per_step]
        self.visited = [torch.tensor(schedule.levels) for schedule in schedules]  # (K_n,) of each speed

    def levels(self, quantile: Tensor) -> Tensor:
        # 1. the part of [0, 1) behind `unmasked`, split evenly among the speeds and theirs among the steps
        drawn = (quantile - self.unmasked) / max(1 - self.unmasked, 1e-9) * len(self.visited)
        speed = drawn.long().clamp(0, len(self.visited) - 1)  # (B,)
        # 2. the level of that step, 0 in front
        level = torch.zeros_like(quantile)
        for number, visited in enumerate(self.visited):
            step = ((drawn - number) * len(visited)).long().clamp(0, len(visited) - 1)
            level = torch.where(speed == number, visited.to(level)[step], level)
        return level.masked_fill(quantile < self.unmasked, 0.0)
