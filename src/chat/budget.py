"""What a run may use of an expert in all: requests, tokens and money.

    aside = budget.reserve({"prompt_tokens": 900, "completion_tokens": 2500})        None: not within the budget
    budget.settle(aside, {"prompt_tokens": 880, "completion_tokens": 130})

The greatest possible use of a request is put aside while it is under way, so the limits are never passed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from src.distributed.parallel import world
from src.io.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Prices:
    """US dollars for a million tokens. cached: of the prompt, read from the server's cache (null: as `input`)."""

    input: float
    output: float
    cached: float | None = None

    def __post_init__(self) -> None:
        for name in ("input", "output", "cached"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"prices.{name} must be at least 0, got {value}")

    def cost(self, usage: Mapping[str, float]) -> float:
        """Dollars for `prompt_tokens` and `completion_tokens`, of which `cached_tokens` of the prompt."""
        prompt, cached = usage.get("prompt_tokens", 0), usage.get("cached_tokens", 0)
        reread = self.input if self.cached is None else self.cached
        millions = (prompt - cached) * self.input + cached * reread + usage.get("completion_tokens", 0) * self.output
        return millions / 1e6


@dataclass
class Budget:
    """What a run may use in all; None: no limit. `reserve` keeps the greatest possible use back until it is known."""

    max_requests: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    prices: Prices | None = None
    spent: dict[str, float] = field(default_factory=lambda: {"requests": 0, "tokens": 0, "cost": 0.0})
    pending: int = 0  # requests whose use is not known yet

    def __post_init__(self) -> None:
        for name, value in self._limits().items():
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"max_{name} must be above 0 or null, got {value}")
        if self.max_cost is not None and self.prices is None:
            raise UserError(f"max_cost={self.max_cost} needs prices: give prices.input and prices.output")

    def reserve(self, usage: Mapping[str, float]) -> dict[str, float] | None:
        """Put one request with this use aside; None where the budget does not allow it."""
        aside = self._sums(usage) | {"requests": 1}
        for name, limit in self._limits().items():
            if limit is not None and self.spent[name] + aside[name] > limit / world():
                return None
        self._add(aside)
        self.pending += 1
        return aside

    def settle(self, aside: Mapping[str, float], usage: Mapping[str, float], *, sent: bool = True) -> None:
        """Replace what was put aside for a request by what it used. sent: whether it has reached a server."""
        self.pending -= 1
        self._add({name: -value for name, value in aside.items()})
        self._add(self._sums(usage) | {"requests": int(sent)})

    def charge(self, usage: Mapping[str, float]) -> None:
        """Count what was used before this process started; `usage` as in a revision or a manifest."""
        self._add(self._sums(usage) | {"requests": usage.get("requests", 1)})

    def _limits(self) -> dict[str, float | None]:
        return {"requests": self.max_requests, "tokens": self.max_tokens, "cost": self.max_cost}

    def _sums(self, usage: Mapping[str, float]) -> dict[str, float]:
        """Tokens and dollars; of lost replies what they may have been."""
        lost = {name: usage.get(f"lost_{name}", 0) for name in ("prompt_tokens", "completion_tokens")}
        parts = [usage, lost]
        tokens = sum(part.get(name, 0) for part in parts for name in lost)
        return {"tokens": tokens, "cost": sum(map(self.prices.cost, parts)) if self.prices else 0.0}

    def _add(self, more: Mapping[str, float]) -> None:
        for name, value in more.items():
            self.spent[name] += value
