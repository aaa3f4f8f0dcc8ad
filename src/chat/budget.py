"""The budget of a run: requests, tokens and dollars.

    budget.reserve({"prompt_tokens": 900, "completion_tokens": 2500})      False: it does not fit
    budget.settle(reserved, {"requests": 1, "prompt_tokens": 880, "completion_tokens": 130})

While a request is in flight its largest possible usage is reserved, so the limits are never exceeded. A usage is a
mapping of counts, as in `Revision.usage`: `requests`, `prompt_tokens`, `completion_tokens`, `cached_tokens`, and
`lost_prompt_tokens`, `lost_completion_tokens`: the most that lost replies may have used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.distributed.parallel import world_size
from src.io.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Prices:
    """US dollars per million tokens. cached: for prompt tokens that the server has cached (null: as `input`)."""

    input: float
    output: float
    cached: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value < math.inf:  # nan would switch max_cost off
                raise UserError(f"prices.{name} must be at least 0, got {value}")

    def cost(self, usage: Mapping[str, float]) -> float:
        """Dollars for `prompt_tokens`, of which `cached_tokens` were cached, and `completion_tokens`."""
        cached = usage.get("cached_tokens", 0)
        cached_price = self.input if self.cached is None else self.cached
        cost = (usage.get("prompt_tokens", 0) - cached) * self.input + cached * cached_price
        return (cost + usage.get("completion_tokens", 0) * self.output) / 1e6


def cost_text(prices: Prices | None, usage: Mapping[str, float]) -> str:
    """`, 1.23 dollars` for a usage, to stand behind its tokens; nothing without prices."""
    if prices is None:
        return ""
    dollars = prices.cost(usage)
    return f", {dollars:{'.2f' if dollars >= 1 else '.2g'}} dollars"


class Budget:
    """Limits of the whole run (None: no limit). `spent` includes what is reserved for the `pending` requests."""

    def __init__(
        self,
        *,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        prices: Prices | None = None,
    ) -> None:
        self.prices = prices
        self._limits = {"requests": max_requests, "tokens": max_tokens, "cost": max_cost}
        self.spent: Counter[str] = Counter()
        self.pending = 0

    def reserve(self, usage: Mapping[str, float]) -> bool:
        """Reserve a request with this usage; False where it does not fit into this process's share of the budget."""
        needed = self._totals({"requests": 1, **usage})
        for name, limit in self._limits.items():
            if limit is not None and self.spent[name] + needed[name] > limit / world_size():
                return False
        self.spent.update(needed)
        self.pending += 1
        return True

    def settle(self, reserved: Mapping[str, float], used: Mapping[str, float]) -> None:
        """Replace a reservation by the actual usage."""
        self.pending -= 1
        self.spent.subtract(self._totals({"requests": 1, **reserved}))
        self.charge(used)

    def charge(self, usage: Mapping[str, float]) -> None:
        """Add a usage, also that of an earlier process of the run."""
        self.spent.update(self._totals(usage))

    def _totals(self, usage: Mapping[str, float]) -> dict[str, Any]:
        lost = {name: usage.get(f"lost_{name}", 0) for name in ("prompt_tokens", "completion_tokens")}
        tokens = sum(usage.get(name, 0) + value for name, value in lost.items())
        cost = self.prices.cost(usage) + self.prices.cost(lost) if self.prices else 0.0
        return {"requests": usage.get("requests", 0), "tokens": tokens, "cost": cost}
