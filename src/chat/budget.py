"""The budget of a run for an expert: requests, tokens and dollars.

    reservation = budget.reserve({"prompt_tokens": 900, "completion_tokens": 2500})      None: over budget
    budget.settle(reservation, {"prompt_tokens": 880, "completion_tokens": 130})

While a request is in flight its largest possible usage is reserved, so the limits are never exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from src.distributed.parallel import world_size
from src.io.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Prices:
    """US dollars per million tokens. cached: for prompt tokens that the server has cached (null: as `input`)."""

    input: float
    output: float
    cached: float | None = None

    def __post_init__(self) -> None:
        for name in ("input", "output", "cached"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"prices.{name} must be at least 0, got {value}")

    def cost(self, usage: Mapping[str, float]) -> float:
        """Dollars for `prompt_tokens`, of which `cached_tokens` were cached, and `completion_tokens`."""
        prompt, cached = usage.get("prompt_tokens", 0), usage.get("cached_tokens", 0)
        cached_price = self.input if self.cached is None else self.cached
        uncached_cost = (prompt - cached) * self.input
        return (uncached_cost + cached * cached_price + usage.get("completion_tokens", 0) * self.output) / 1e6


@dataclass
class Budget:
    """Limits for the whole run; None: no limit. `spent` includes what is reserved for requests in flight."""

    max_requests: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    prices: Prices | None = None
    spent: dict[str, float] = field(default_factory=lambda: {"requests": 0, "tokens": 0, "cost": 0.0})
    pending: int = 0  # open reservations

    def __post_init__(self) -> None:
        for name, value in self._limits().items():
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"max_{name} must be above 0 or null, got {value}")
        if self.max_cost is not None and self.prices is None:
            raise UserError(f"max_cost={self.max_cost} needs prices: give prices.input and prices.output")

    def reserve(self, usage: Mapping[str, float]) -> dict[str, float] | None:
        """Reserve one request with this usage; None where it does not fit this process's share of the budget."""
        reservation = self._totals(usage) | {"requests": 1}
        for name, limit in self._limits().items():
            if limit is not None and self.spent[name] + reservation[name] > limit / world_size():
                return None
        self._add(reservation)
        self.pending += 1
        return reservation

    def settle(self, reservation: Mapping[str, float], usage: Mapping[str, float], *, sent: bool = True) -> None:
        """Replace a reservation by the actual usage. sent: whether the request reached a server."""
        self.pending -= 1
        self._add({name: -value for name, value in reservation.items()})
        self._add(self._totals(usage) | {"requests": int(sent)})

    def charge(self, usage: Mapping[str, float]) -> None:
        """Add what was spent before this process started; `usage` as in a revision or a manifest."""
        self._add(self._totals(usage) | {"requests": usage.get("requests", 1)})

    def _limits(self) -> dict[str, float | None]:
        return {"requests": self.max_requests, "tokens": self.max_tokens, "cost": self.max_cost}

    def _totals(self, usage: Mapping[str, float]) -> dict[str, float]:
        """Tokens and dollars, including the most that lost replies may have used (`lost_*`)."""
        lost = {name: usage.get(f"lost_{name}", 0) for name in ("prompt_tokens", "completion_tokens")}
        parts = [usage, lost]
        tokens = sum(part.get(name, 0) for part in parts for name in lost)
        return {"tokens": tokens, "cost": sum(map(self.prices.cost, parts)) if self.prices else 0.0}

    def _add(self, amounts: Mapping[str, float]) -> None:
        for name, amount in amounts.items():
            self.spent[name] += amount
