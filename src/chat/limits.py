"""Limits on the client's side: how many requests in flight, how fast, how often, for how much."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from src.chat.budget import Prices
from src.distributed.parallel import world_size
from src.io.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the whole run; each process gets an equal share. They change no answer. null: no limit."""

    concurrency: int = 64  # requests in flight
    requests_per_minute: float | None = None  # spread evenly
    tokens_per_minute: float | None = None
    timeout_s: float = 120.0  # for one request
    deadline_s: float = 900.0  # for one draft with all its attempts
    attempts: int = 6  # that fail, other than by a 429 or a server that is down, before the draft fails
    max_requests: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None  # dollars; needs `prices`
    prices: Prices | None = None
    pause_after: int = 8  # consecutive failures before all requests wait `pause_s`
    pause_s: float = 5.0
    give_up_s: float = 300.0  # without a reply before the round ends with an error

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "prices" and value is not None and not 0 < value < math.inf:  # nan would switch a limit off
                raise UserError(f"limits.{name} must be above 0, got {value}")
        if self.prices is not None and not isinstance(self.prices, Prices):
            raise UserError("prices need a target: {target: src.chat.budget.Prices, input: 1.1, output: 4.4}")
        if self.max_cost is not None and self.prices is None:
            raise UserError(f"max_cost={self.max_cost} needs prices: give prices.input and prices.output")

    def check_processes(self) -> None:
        """Raise UserError where a limit is too low to be shared by all processes."""
        for name in ("concurrency", "max_requests"):
            if (getattr(self, name) or math.inf) < world_size():
                raise UserError(
                    f"limits.{name}={getattr(self, name)} is shared by {world_size()} processes: raise it, or use fewer"
                )


class Rate:
    """Spreads requests or tokens evenly over time, `per_minute` of all processes together. None: no limit."""

    def __init__(self, per_minute: float | None) -> None:
        self._per_minute, self._free_at = per_minute, 0.0

    def take(self, amount: float, now: float) -> float:
        """Book an amount; returns the seconds to wait before it may be used. now: seconds of `time.monotonic`"""
        start = max(now, self._free_at)
        self._free_at = start + self._seconds(amount)
        return start - now

    def give_back(self, amount: float) -> None:
        """Return what was booked and not used."""
        self._free_at -= self._seconds(amount)

    def _seconds(self, amount: float) -> float:
        return amount * 60 * world_size() / self._per_minute if self._per_minute else 0.0


def backoff(attempt: int, *, base: float = 0.5, cap: float = 30.0) -> float:
    """Seconds between attempt `attempt` (from 1) and the next: exponential backoff with full jitter."""
    return random.uniform(0, min(cap, base * 2 ** min(attempt - 1, 10)))


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of a Retry-After header; 0 where there is none, or a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 <= seconds < math.inf:
            return seconds
    return 0.0
