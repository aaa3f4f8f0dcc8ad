"""Rates, budget, backoff, prices: simulated in virtual time and compared with sums by hand."""

from __future__ import annotations

import heapq
from random import Random

import pytest

from src.chat.budget import Budget, Prices
from src.chat.limits import Limits, Rate, backoff, retry_after
from src.chat.profiles import Profile, choose

NAN, INF = float("nan"), float("inf")
USE = {"prompt_tokens": 1000, "completion_tokens": 500}
PRICES = Prices(input=1.1, output=4.4, cached=0.275)


def simulate(rate: Rate, *, reserved: float, used: float, count: int, at_once: int = 64) -> list[float]:
    """Times at which requests start that take 0.1 to 0.5 s, `at_once` in flight, and give back what they do not use."""
    rng, starts = Random(0), []
    free = [0.0] * at_once  # times at which the slots are free
    returns: list[float] = []  # times at which requests in flight give back
    for _ in range(count):
        now = heapq.heappop(free)
        while returns and returns[0] <= now:
            heapq.heappop(returns)
            rate.give_back(reserved - used)
        starts.append(now + rate.take(reserved, now))
        end = starts[-1] + rng.uniform(0.1, 0.5)
        heapq.heappush(free, end)
        heapq.heappush(returns, end)
    return sorted(starts)


@pytest.mark.parametrize(
    ("per_minute", "reserved", "used", "count"), [(5, 1, 1, 20), (600, 1, 1, 1200), (60_000, 1000, 200, 600)]
)
def test_a_rate_is_kept_and_used_up(per_minute: int, reserved: int, used: int, count: int) -> None:
    starts = simulate(Rate(per_minute), reserved=reserved, used=used, count=count)
    most = max(sum(start <= other < start + 60 for other in starts) for start in starts)  # brute force
    assert most * used <= per_minute * 1.05 + reserved
    assert starts[-1] - starts[0] <= 60 * count * used / per_minute + 64 * 60 * reserved / per_minute


def test_backoff_is_spread_over_its_range() -> None:
    for attempt, top in ((1, 0.5), (2, 1.0), (4, 4.0), (2000, 30.0)):
        waits = [backoff(attempt) for _ in range(2000)]
        assert 0 <= min(waits) < 0.05 * top
        assert 0.95 * top < max(waits) <= top
        assert sum(waits) / len(waits) == pytest.approx(top / 2, rel=0.1)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0), ({"retry-after": "3"}, 3), ({"retry-after": "0.5"}, 0.5), ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0), ({"retry-after": "-1"}, 0), ({"retry-after": "inf"}, 0),
    ],
)  # fmt: skip
def test_retry_after(headers: dict[str, str], seconds: float) -> None:
    assert retry_after(headers) == seconds


def test_prices_by_hand() -> None:
    assert PRICES.cost(USE) == pytest.approx(0.0011 + 0.0022)
    assert PRICES.cost({**USE, "cached_tokens": 400}) == pytest.approx((600 * 1.1 + 400 * 0.275 + 500 * 4.4) / 1e6)
    assert Prices(input=1, output=2).cost({**USE, "cached_tokens": 400}) == pytest.approx(0.002)


@pytest.mark.parametrize("limits", [{"max_requests": 25}, {"max_tokens": 20_000}, {"max_cost": 0.05, "prices": PRICES}])
def test_a_budget_is_never_passed_and_used_up(limits: dict) -> None:
    """Whatever requests turn out to use, up to what was put aside for them, and however they overlap."""
    rng = Random(0)
    for _ in range(20):
        budget = Budget(**limits)
        for _ in range(500):
            if rng.random() < 0.5:
                budget.reserve(USE)
            elif budget.pending:
                budget.settle(USE, {"requests": 1, **{name: rng.randint(0, most) for name, most in USE.items()}})
            for name, limit in limits.items():
                if name != "prices":
                    assert budget.spent[name.removeprefix("max_")] <= limit + 1e-9
        assert not budget.reserve(USE)


def test_what_was_used_before_counts_also_what_was_lost() -> None:
    budget = Budget(max_tokens=3000, prices=PRICES)
    budget.charge({**USE, "requests": 3, "lost_prompt_tokens": 600, "lost_completion_tokens": 100})
    assert budget.spent == {"requests": 3, "tokens": 2200, "cost": pytest.approx(0.0033 + 0.00066 + 0.00044)}
    assert not budget.reserve(USE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Limits(timeout_s=NAN), "limits.timeout_s must be above 0"),
        (lambda: Limits(pause_s=INF), "limits.pause_s must be above 0"),
        (lambda: Limits(concurrency=0), "limits.concurrency must be above 0, got 0"),
        (lambda: Limits(max_cost=1.0), "max_cost=1.0 needs prices"),
        (lambda: Limits(prices={"input": 1}), "prices need a target"),  # type: ignore[arg-type]
        (lambda: Prices(input=NAN, output=1), "prices.input must be"),
        (lambda: Profile(limit="length"), "limit must be"),
        (lambda: Profile(output="xml"), "output must be"),
        (lambda: choose("gpt", "m"), "profile must be auto or one of chat, .*, got 'gpt'"),
    ],
)  # fmt: skip
def test_settings_that_would_switch_a_limit_off_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_fewer_requests_than_processes_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("src.chat.limits.world_size", lambda: 4)
    for name in ("concurrency", "max_requests"):
        with pytest.raises(ValueError, match=rf"limits.{name}=3 is shared by 4 processes"):
            Limits(**{name: 3}).check_processes()


def test_each_process_has_its_share(monkeypatch) -> None:
    monkeypatch.setattr("src.chat.limits.world_size", lambda: 4)
    monkeypatch.setattr("src.chat.budget.world_size", lambda: 4)
    rate, budget = Rate(60), Budget(max_requests=9)
    assert [rate.take(1, 0.0) for _ in range(3)] == [0, 4, 8]
    assert [budget.reserve({}) for _ in range(4)] == [True, True, False, False]
