"""Client-side limits: requests in flight, rates, backoff, and when to give up on a server.

    Gate       adaptive limit on the requests in flight: rejections lower it, replies raise it
    Pace       token bucket for requests or tokens per minute
    Breaker    circuit breaker: a pause while the server is down, an error when it stays down
    backoff    seconds before the next attempt

None of them is bound to an event loop, so they live on from round to round. Limits apply to the whole run: each process
gets an equal share, also of the budget (src/chat/budget.py).
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from src.chat.budget import Prices
from src.distributed.parallel import world_size
from src.io.errors import UserError

BURST_S = 1.0  # capacity of a token bucket, in seconds at its rate: servers enforce windows shorter than a minute
POLL_S = 0.1  # how often a waiting request checks for capacity that others have returned
LIMIT_INCREASE = 0.1  # per reply; a 429 lowers the limit by 1, so it holds while up to 9 % of the requests are rejected
MAX_PAUSE_S = 60.0
MAX_429S = 3  # consecutive 429s after which all requests wait
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the whole run. They change no answer, so answers stay valid when they change. null: no limit.

    concurrency: requests in flight; fewer while the server rejects many with 429
    requests_per_minute, tokens_per_minute: rates; the x-ratelimit headers of the server may lower them
    timeout_s, deadline_s: for one request, and for one draft with all its attempts
    attempts: failed attempts, other than 429s and a server that is down, after which a draft fails
    max_requests, max_tokens, max_cost: budget; `max_cost` in dollars needs `prices`
    pause_after, pause_s, give_up_s: after `pause_after` consecutive failures all requests wait `pause_s`; after
        `give_up_s` without a reply the round ends with an error
    """

    concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout_s: float = 120.0
    deadline_s: float = 900.0
    attempts: int = 6
    max_requests: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    prices: Prices | None = None
    pause_after: int = 8
    pause_s: float = 5.0
    give_up_s: float = 300.0

    def check_processes(self) -> None:
        """Raise UserError where a limit is too low to be shared by all processes."""
        for name in ("concurrency", "max_requests"):
            value = getattr(self, name)
            if value is not None and value < world_size():
                raise UserError(
                    f"limits.{name}={value} is shared by {world_size()} processes: raise it, or use fewer processes"
                )

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts", "pause_after"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("timeout_s", "deadline_s", "pause_s", "give_up_s"):
            if not 0 < getattr(self, name) < math.inf:  # rejects nan as well
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.prices is not None and not isinstance(self.prices, Prices):
            raise UserError("prices need a target: {target: src.chat.budget.Prices, input: 1.1, output: 4.4}")


class ServerDown(ConnectionError):
    """Raised when a server has been unreachable, failing or rejecting every request for longer than `give_up_s`."""


class Clock:
    """Monotonic time in seconds, and sleep; tests replace it."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def backoff(attempt: int, random: Random, *, base: float = 0.5, cap: float = 30.0, minimum: float = 0.0) -> float:
    """Seconds before attempt `attempt` + 1: exponential backoff with full jitter, on top of `minimum`.

    minimum: the server's Retry-After. The jitter is added to it, or all rejected requests would return at once.
    """
    return minimum + random.uniform(0, min(cap, base * 2 ** (attempt - 1)))


class Gate:
    """Admits at most `limit` requests at once, in order of arrival. A 429 lowers the limit, replies raise it again."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise UserError(f"concurrency must be at least 1, got {limit}")
        self.max_limit, self.limit, self.active = limit, float(limit), 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self, *, first: bool = False) -> None:
        """Wait for admission. first: ahead of the queue, for a retry."""
        if self.active < int(self.limit) and (first or not self._waiting):
            self.active += 1
            return
        admission: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if first else self._waiting.append)(admission)
        try:
            await admission
        except asyncio.CancelledError:
            if not admission.cancelled():  # admitted at the same moment
                self.leave()
            raise

    def leave(self) -> None:
        self.active -= 1
        self._admit()

    def answered(self) -> None:
        self.limit = min(self.max_limit, self.limit + LIMIT_INCREASE)
        self._admit()

    def refused(self) -> None:
        self.limit = max(1.0, self.limit - 1)

    def _admit(self) -> None:
        while self._waiting and self.active < int(self.limit):
            admission = self._waiting.popleft()
            if not admission.done():
                admission.set_result(None)
                self.active += 1


class Pace:
    """A token bucket that refills at `per_minute`; None: no limit, until the server's headers set one.

    A request larger than the bucket goes out when the bucket is full, and leaves a debt.
    """

    def __init__(self, per_minute: float | None, clock: Clock) -> None:
        if per_minute is not None and not 0 < per_minute < math.inf:
            raise UserError(f"a rate per minute must be above 0, got {per_minute}")
        self._clock, self._per_minute = clock, per_minute
        self._level, self._refilled_at, self._closed_until = math.inf, clock.now(), -math.inf
        self._queue = Gate(1)

    async def take(self, amount: float) -> None:
        """Wait until the bucket holds `amount`, and take it out."""
        if self._per_minute is None and not self.closed:
            return
        await self._queue.enter()
        try:
            while (wait := self._wait(amount)) > 0:
                await self._clock.sleep(min(wait, POLL_S))
            self._level -= amount
        finally:
            self._queue.leave()

    def settle(self, reserved: float, used: float) -> None:
        """Correct the level by the difference between what was taken and what was used."""
        self._level += reserved - used

    def close(self, seconds: float) -> None:
        """Hold back all requests for `seconds`, at most MAX_PAUSE_S."""
        self._closed_until = max(self._closed_until, self._clock.now() + min(seconds, MAX_PAUSE_S))

    @property
    def closed(self) -> bool:
        return self._closed_until > self._clock.now()

    def apply_headers(self, headers: Mapping[str, str], unit: str) -> None:
        """Lower the rate, or close, as the x-ratelimit headers of a response say. unit: `requests` or `tokens`"""
        limit = _number(headers.get(f"x-ratelimit-limit-{unit}"))
        if limit and (self._per_minute is None or limit < self._per_minute):
            self._per_minute = limit
        if _number(headers.get(f"x-ratelimit-remaining-{unit}")) == 0:
            self.close(seconds_of(headers.get(f"x-ratelimit-reset-{unit}")) or 0.0)

    def _wait(self, amount: float) -> float:
        """Refill the bucket; returns the seconds until it holds `amount`."""
        now, rate = self._clock.now(), (self._per_minute or math.inf) / 60 / world_size()
        capacity = max(1.0, rate * BURST_S)
        elapsed = now - self._refilled_at
        self._level = min(capacity, self._level + elapsed * rate if elapsed > 0 else self._level)
        self._refilled_at = now
        missing = min(amount, capacity) - self._level
        return max(missing / rate if missing > 1e-9 else 0.0, self._closed_until - now)


class Breaker:
    """Circuit breaker: after `after` consecutive failures all requests wait `pause_s` between attempts.

    `failed` raises ServerDown once the failures have lasted `give_up_s` seconds.
    """

    def __init__(self, *, after: int, pause_s: float, give_up_s: float, clock: Clock) -> None:
        self.after, self.pause_s, self.give_up_s = after, pause_s, give_up_s
        self._clock, self._failures, self._first_failure_at, self._paused_until = clock, 0, 0.0, -math.inf

    async def ready(self) -> None:
        """Wait for the end of a pause."""
        while (wait := self._paused_until - self._clock.now()) > 0:
            await self._clock.sleep(wait)

    def answered(self) -> None:
        self._failures, self._paused_until = 0, -math.inf

    def failed(self, reason: str) -> bool:
        """Record a failure; returns whether the server seems to be down."""
        now = self._clock.now()
        if not self._failures:
            self._first_failure_at = now
        self._failures += 1
        if self._failures < self.after:
            return False
        elapsed = now - self._first_failure_at
        if elapsed >= self.give_up_s:
            raise ServerDown(f"the expert's server has been failing for {elapsed:.0f} s: {reason}")
        self._paused_until = now + self.pause_s
        return True


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of a Retry-After header, 0 where there is none. A date is left to the backoff."""
    in_ms = _number(headers.get("retry-after-ms"))
    return in_ms / 1000 if in_ms is not None else _number(headers.get("retry-after")) or 0.0


def seconds_of(text: str | None) -> float | None:
    """`6m0s`, `20ms` or `1.5` in seconds; None where it is none of these."""
    if text and (parts := _DURATION.findall(text)):
        return sum(float(number) * _SECONDS[unit] for number, unit in parts)
    return _number(text)


def _number(text: str | None) -> float | None:
    """A finite number that is not negative, else None."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None
