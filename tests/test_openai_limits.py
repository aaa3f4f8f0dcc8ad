"""Concurrency, rates, budget, breaker and backoff, on a clock that jumps from one event to the next."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable
from itertools import pairwise
from random import Random

import pytest

from src.chat.budget import Budget, Prices
from src.chat.limits import Breaker, Clock, Gate, Limits, Pace, ServerDown, backoff, retry_after, seconds_of


class Jumping(Clock):
    """A clock that stands still while anything can run, and then jumps to the next end of a sleep."""

    def __init__(self) -> None:
        self.time, self._sleeping, self._count = 1000.0, [], 0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleeping, (self.time + seconds, self._count, woken))
        await woken

    def run(self, work: Awaitable):
        """The result of some work."""

        async def drive():
            task = asyncio.ensure_future(work)
            while not task.done():
                for _ in range(20):
                    await asyncio.sleep(0)
                if not task.done() and self._sleeping:
                    self.time, _, woken = heapq.heappop(self._sleeping)
                    if not woken.done():
                        woken.set_result(None)
            return task.result()

        return asyncio.run(drive())


def _most_within(times: list[float], window: float, amounts: list[float] | None = None) -> float:
    """The greatest sum of what happened within any window: brute force."""
    amounts = amounts or [1.0] * len(times)
    return max(sum(a for t, a in zip(times, amounts, strict=True) if start <= t < start + window) for start in times)


@pytest.mark.parametrize("per_minute", [5, 60, 600])
def test_requests_keep_to_their_rate(per_minute: int) -> None:
    clock, sent = Jumping(), []
    pace = Pace(per_minute, clock)

    async def one() -> None:
        await pace.take(1)
        sent.append(clock.now())

    async def all_of_them() -> None:
        await asyncio.gather(*(one() for _ in range(2 * per_minute)))

    clock.run(all_of_them())
    assert _most_within(sent, 60) <= per_minute * (1 + 1 / 60) + 1  # a second's worth may go at once
    assert sent[-1] - sent[0] <= 120 + 1  # and no time is wasted


def test_tokens_that_were_not_used_are_given_back() -> None:
    """Reserved 1000 each, 200 used: the rate of what is used is what was allowed."""
    clock, rng = Jumping(), Random(0)
    pace, sent, used = Pace(60_000, clock), [], []

    async def one() -> None:
        await pace.take(1000)
        sent.append(clock.now())
        await clock.sleep(rng.uniform(0.1, 0.5))
        used.append(200)
        pace.settle(1000, 200)

    async def all_of_them() -> None:
        await asyncio.gather(*(one() for _ in range(600)))

    clock.run(all_of_them())
    assert _most_within(sent, 60, [200.0] * len(sent)) <= 60_000 * 1.05
    assert sent[-1] - sent[0] < 600 * 1000 / 1000 * 0.4  # without giving back it would take 600 s


def test_a_request_larger_than_the_bucket_goes_and_leaves_a_debt() -> None:
    clock = Jumping()
    pace = Pace(600, clock)  # 10 a second

    async def two() -> float:
        await pace.take(100)
        await pace.take(10)
        return clock.now()

    assert clock.run(two()) == pytest.approx(1010, abs=0.6)


def test_headers_of_the_server_lower_the_rate_and_close() -> None:
    clock = Jumping()
    pace = Pace(None, clock)

    async def waited(**headers: str) -> float:
        began = clock.now()
        pace.apply_headers({f"x-ratelimit-{k.replace('_', '-')}": v for k, v in headers.items()}, "requests")
        await pace.take(1)
        return clock.now() - began

    assert clock.run(waited(limit_requests="abc", remaining_requests="")) == 0
    assert clock.run(waited(remaining_requests="0", reset_requests="6.5s")) == pytest.approx(6.5)
    assert clock.run(waited(remaining_requests="0", reset_requests="6m2s")) == pytest.approx(60)  # then it is tried
    assert clock.run(waited(limit_requests="30")) <= 2
    assert clock.run(waited()) == pytest.approx(2, abs=0.01)
    assert clock.run(waited(limit_requests="3000")) == pytest.approx(2, abs=0.01)  # never raised


def test_the_gate_lets_in_in_turn_and_no_more_than_allowed() -> None:
    clock, inside, most, order = Jumping(), 0, 0, []
    gate = Gate(3)

    async def one(number: int, *, first: bool = False) -> None:
        nonlocal inside, most
        await gate.enter(first=first)
        order.append(number)
        inside += 1
        most = max(most, inside)
        await clock.sleep(1)
        inside -= 1
        gate.leave()

    async def all_of_them() -> None:
        tasks = [asyncio.create_task(one(n)) for n in range(10)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(one(10, first=True)))
        await asyncio.sleep(0)
        tasks[5].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    clock.run(all_of_them())
    assert most == 3
    assert order == [0, 1, 2, 10, 3, 4, 6, 7, 8, 9]
    assert gate.active == 0


def test_the_gate_closes_under_many_429s_and_stands_a_few() -> None:
    rng = Random(0)

    def after(share: float) -> int:
        gate = Gate(64)
        for _ in range(5000):
            (gate.refused if rng.random() < share else gate.answered)()
        return int(gate.limit)

    assert after(0.02) >= 60
    assert after(0.05) >= 50
    assert after(0.3) == 1


def test_the_gate_survives_a_change_of_the_event_loop() -> None:
    gate = Gate(1)

    async def round_trip() -> int:
        async def one() -> None:
            await gate.enter()
            await asyncio.sleep(0)
            gate.leave()

        await asyncio.gather(*(one() for _ in range(5)))
        return gate.active

    assert [asyncio.run(round_trip()) for _ in range(3)] == [0, 0, 0]


def test_backoff_is_spread_over_its_range_and_never_earlier_than_asked() -> None:
    rng = Random(0)
    for attempt, top in ((1, 0.5), (2, 1.0), (4, 4.0), (20, 30.0)):
        waits = [backoff(attempt, rng) for _ in range(2000)]
        assert 0 <= min(waits) < 0.05 * top
        assert 0.95 * top < max(waits) <= top
        assert sum(waits) / len(waits) == pytest.approx(top / 2, rel=0.1)
    assert min(backoff(3, rng, minimum=7.0) for _ in range(1000)) >= 7.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0), ({"retry-after": "3"}, 3), ({"retry-after": "0.5"}, 0.5), ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0), ({"retry-after": "-1"}, 0), ({"retry-after": "inf"}, 0),
    ],
)  # fmt: skip
def test_retry_after(headers: dict[str, str], seconds: float) -> None:
    assert retry_after(headers) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1), ("6m0s", 360), ("20ms", 0.02), ("1.5", 1.5), ("2h3m", 7380), ("soon", None), (None, None)],
)  # fmt: skip
def test_reset_times(text: str | None, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


USE = {"prompt_tokens": 1000, "completion_tokens": 500}
PRICES = Prices(input=1.1, output=4.4, cached=0.275)


def test_prices_by_hand() -> None:
    assert PRICES.cost(USE) == pytest.approx(0.0011 + 0.0022)
    assert PRICES.cost({**USE, "cached_tokens": 400}) == pytest.approx((600 * 1.1 + 400 * 0.275 + 500 * 4.4) / 1e6)
    assert Prices(input=1, output=2).cost({**USE, "cached_tokens": 400}) == pytest.approx(0.002)


@pytest.mark.parametrize(
    "limits",
    [{"max_requests": 25}, {"max_tokens": 20_000}, {"max_cost": 0.05, "prices": PRICES}],
)
def test_a_budget_is_never_passed_and_used_up(limits: dict) -> None:
    """Whatever requests turn out to use, up to what was put aside for them, and however they overlap."""
    rng = Random(0)
    for _ in range(20):
        budget, under_way = Budget(**limits), []
        for _ in range(500):
            if rng.random() < 0.5 and (aside := budget.reserve(USE)):
                under_way.append(aside)
            elif under_way:
                used = {name: rng.randint(0, most) for name, most in USE.items()}
                budget.settle(under_way.pop(rng.randrange(len(under_way))), used)
            for name, limit in limits.items():
                if name != "prices":
                    assert budget.spent[name.removeprefix("max_")] <= limit + 1e-9
        assert budget.reserve(USE) is None
        assert budget.pending == len(under_way)


def test_what_was_used_before_counts() -> None:
    budget = Budget(max_tokens=2000)
    budget.charge({**USE, "requests": 3})
    assert budget.spent == {"requests": 3, "tokens": 1500, "cost": 0.0}
    assert budget.reserve(USE) is None


def test_wrong_limits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_cost=1.0 needs prices"):
        Budget(max_cost=1.0)
    with pytest.raises(ValueError, match="max_tokens must be above 0 or null, got 0"):
        Budget(max_tokens=0)
    with pytest.raises(ValueError, match="concurrency must be at least 1, got 0"):
        Limits(concurrency=0)
    with pytest.raises(ValueError, match="timeout_s must be above 0, got 0"):
        Limits(timeout_s=0)
    with pytest.raises(ValueError, match="a rate per minute must be above 0, got -1"):
        Pace(-1, Clock())


def test_the_breaker_pauses_then_gives_up_and_an_answer_closes_it() -> None:
    clock, tries = Jumping(), []
    breaker = Breaker(after=3, pause_s=10, give_up_s=35, clock=clock)

    async def one(*, works: bool) -> None:
        await breaker.ready()
        tries.append(clock.now() - 1000)
        breaker.answered() if works else breaker.failed("connection")

    for works in (False, False, True, False, False, False):
        clock.run(one(works=works))
    assert tries == [0] * 6
    clock.run(one(works=True))
    assert tries[-1] == 10
    for _ in range(6):
        clock.run(one(works=False))
    with pytest.raises(ServerDown, match="failing for 40 s: connection"):
        clock.run(one(works=False))
    assert [b - a for a, b in pairwise(tries[7:])] == [0, 0, 10, 10, 10, 10]
