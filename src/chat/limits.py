"""What keeps an expert within its limits: how many requests at once, how fast, and when to give up on a server.

    Gate       at most so many requests at once; fewer where the server asks for it
    Pace       requests or tokens per minute
    Breaker    a pause when a server is down, and an error when it stays down
    backoff    how long to wait before another attempt

None of them is bound to an event loop, so they last from one round to the next. Limits are those of the whole run:
each of its processes takes an equal share, of what src/chat/budget.py counts too.
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
from src.distributed.parallel import world
from src.io.errors import UserError

BURST_S = 1.0  # seconds' worth of a rate that may go out at once: servers enforce shorter windows than a minute
RECHECK_S = 0.1  # how often a waiting request looks whether tokens were given back
RISE = 0.1  # what an answer adds to the number of requests at once; a 429 takes 1, so up to 9 % of them change nothing
LONGEST_CLOSED_S = 60.0
ROW = 3  # 429s without an answer in between, after which all wait
_RESET = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may use. None of it changes an answer, so answers are kept when it changes. null: no limit.

    concurrency: requests at once; fewer while the server refuses many with 429
    requests_per_minute, tokens_per_minute: the server may name lower ones in its x-ratelimit headers
    timeout_s, deadline_s: for one request, and for one draft with all its attempts
    attempts: that may fail, other than by 429 or because the server is down, before the draft counts as failed
    max_requests, max_tokens, max_cost: in all; `max_cost` in dollars needs `prices`
    pause_after, pause_s, give_up_s: after so many failures in a row all wait for so long; so long without an answer is
        an error, which ends the round
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
        """Raise UserError where there is less of something than processes that share it."""
        for name in ("concurrency", "max_requests"):
            value = getattr(self, name)
            if value is not None and value < world():
                raise UserError(
                    f"limits.{name}={value} is shared by {world()} processes: raise it, or use fewer processes"
                )

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts", "pause_after"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("timeout_s", "deadline_s", "pause_s", "give_up_s"):
            if not 0 < getattr(self, name) < math.inf:  # so nan is refused, too
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.prices is not None and not isinstance(self.prices, Prices):
            raise UserError("prices need a target: {target: src.chat.budget.Prices, input: 1.1, output: 4.4}")


class ServerDown(ConnectionError):
    """A server that could not be reached, or only failed or refused, for longer than the limit."""


class Clock:
    """Time in seconds, and waiting."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def backoff(attempt: int, random: Random, *, base: float = 0.5, most: float = 30.0, asked: float = 0.0) -> float:
    """Seconds before attempt number `attempt` + 1: full jitter over a doubling range, never less than was asked for.

    asked: the server's Retry-After. The jitter goes on top, or all that were refused together would return together.
    """
    return asked + random.uniform(0, min(most, base * 2 ** (attempt - 1)))


class Gate:
    """Lets at most `limit` in at once, first come first served. A 429 lowers the number, answers raise it again."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise UserError(f"concurrency must be at least 1, got {limit}")
        self.most, self.limit, self.active = limit, float(limit), 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self, *, first: bool = False) -> None:
        """Wait for a place. first: ahead of the others, for a request that had one before."""
        if self.active < int(self.limit) and (first or not self._waiting):
            self.active += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if first else self._waiting.append)(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():  # it was let in at the same moment
                self.leave()
            raise

    def leave(self) -> None:
        self.active -= 1
        self._admit()

    def answered(self) -> None:
        self.limit = min(self.most, self.limit + RISE)
        self._admit()

    def refused(self) -> None:
        self.limit = max(1.0, self.limit - 1)

    def _admit(self) -> None:
        while self._waiting and self.active < int(self.limit):
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                self.active += 1


class Pace:
    """A token bucket of `per_minute` units; None: no limit, until the server names one.

    A request larger than the bucket goes when that is full, and leaves a debt.
    """

    def __init__(self, per_minute: float | None, clock: Clock) -> None:
        if per_minute is not None and not 0 < per_minute < math.inf:
            raise UserError(f"a rate per minute must be above 0, got {per_minute}")
        self._clock, self._per_minute = clock, per_minute
        self._level, self._seen, self._closed = math.inf, clock.now(), -math.inf
        self._turn = Gate(1)

    async def take(self, amount: float) -> None:
        """Wait until `amount` units may be used."""
        if self._per_minute is None and not self.closed:
            return
        await self._turn.enter()
        try:
            while (wait := self._wait(amount)) > 0:
                await self._clock.sleep(min(wait, RECHECK_S))
            self._level -= amount
        finally:
            self._turn.leave()

    def settle(self, reserved: float, used: float) -> None:
        """Give back what was taken too much, or take what was taken too little."""
        self._level += reserved - used

    def close(self, seconds: float) -> None:
        """Nothing goes out for so long, or until it is worth another try."""
        self._closed = max(self._closed, self._clock.now() + min(seconds, LONGEST_CLOSED_S))

    @property
    def closed(self) -> bool:
        return self._closed > self._clock.now()

    def heed(self, headers: Mapping[str, str], unit: str) -> None:
        """Keep to what the x-ratelimit headers of a reply say. unit: `requests` or `tokens`"""
        limit = _number(headers.get(f"x-ratelimit-limit-{unit}"))
        if limit and (self._per_minute is None or limit < self._per_minute):
            self._per_minute = limit
        if _number(headers.get(f"x-ratelimit-remaining-{unit}")) == 0:
            self.close(seconds_of(headers.get(f"x-ratelimit-reset-{unit}")) or 0.0)

    def _wait(self, amount: float) -> float:
        """Seconds until `amount` may go."""
        now, rate = self._clock.now(), (self._per_minute or math.inf) / 60 / world()
        full = max(1.0, rate * BURST_S)
        self._level = min(full, self._level + (now - self._seen) * rate if now > self._seen else self._level)
        self._seen = now
        lacking = min(amount, full) - self._level
        return max(lacking / rate if lacking > 1e-9 else 0.0, self._closed - now)


class Breaker:
    """Stops the traffic to a server that is down: after `after` failures in a row, all wait `pause_s` between tries.

    Raises ServerDown once it has been failing for `give_up_s` seconds.
    """

    def __init__(self, *, after: int, pause_s: float, give_up_s: float, clock: Clock) -> None:
        self.after, self.pause_s, self.give_up_s = after, pause_s, give_up_s
        self._clock, self._row, self._since, self._open = clock, 0, 0.0, -math.inf

    async def ready(self) -> None:
        """Wait until requests may go out."""
        while (wait := self._open - self._clock.now()) > 0:
            await self._clock.sleep(wait)

    def answered(self) -> None:
        self._row, self._open = 0, -math.inf

    def failed(self, why: str) -> bool:
        """Count a failure; whether the server seems to be down."""
        now = self._clock.now()
        if not self._row:
            self._since = now
        self._row += 1
        if self._row < self.after:
            return False
        if now - self._since >= self.give_up_s:
            raise ServerDown(f"the expert's server has been failing for {now - self._since:.0f} s: {why}")
        self._open = now + self.pause_s
        return True


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a reply asks to wait, 0 where it does not say. A date is left to the backoff."""
    in_ms = _number(headers.get("retry-after-ms"))
    return in_ms / 1000 if in_ms is not None else _number(headers.get("retry-after")) or 0.0


def seconds_of(text: str | None) -> float | None:
    """`6m0s`, `20ms` or `1.5` in seconds."""
    if text and (parts := _RESET.findall(text)):
        return sum(float(number) * _SECONDS[unit] for number, unit in parts)
    return _number(text)


def _number(text: str | None) -> float | None:
    """A finite number that is not negative, else None."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None
