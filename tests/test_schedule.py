"""How many tokens a step unmasks, and where a text ends."""

from __future__ import annotations

import pytest
import torch

from src.samplers.schedule import Progress, Schedule
from src.types import SpecialIds

MASK, EOT = 0, 2
SPECIAL = SpecialIds(mask=MASK, eos=1, eot=EOT, banned=(MASK,), vocab_size=12)
NO_ROW = torch.zeros(1, dtype=torch.bool)


@pytest.mark.parametrize(("number", "steps"), [(n, s) for n in (1, 2, 7, 10, 13) for s in (1, 2, 3, 7) if s <= n])
def test_unmasks_are_an_even_split_with_the_remainder_first(number, steps):
    tokens = torch.full((1, number), MASK)
    schedule = Schedule(length=number, tokens_per_step=None, steps=steps)
    progress = Progress(schedule, tokens, SPECIAL)
    counts, left = [], []
    while (tokens == MASK).any():
        left.append(int(progress.steps_left))
        counts.append(int(progress.count(schedule.chance(progress.steps, progress.steps_left))))
        tokens[:, : sum(counts)] = 5
        progress.finish(tokens, post=NO_ROW, last=NO_ROW)
    assert counts == [number // steps + (step < number % steps) for step in range(steps)]
    assert left == list(range(steps, 0, -1))
    assert int(progress.steps) == steps


@pytest.mark.parametrize("shift", [1 / 3, 0.9, 3.0, 20.0])
@pytest.mark.parametrize(("number", "steps"), [(64, 8), (64, 64), (13, 5), (128, 16)])
def test_a_shifted_schedule_follows_its_curve(shift, number, steps):
    """LaViDa's: of n tokens, n s x / (1 + (s - 1) x) after the share x of the steps; at least one a step."""
    tokens = torch.full((1, number), MASK)
    schedule = Schedule(length=number, tokens_per_step=None, steps=steps, shift=shift)
    progress = Progress(schedule, tokens, SPECIAL)
    unmasked = 0
    for step in range(1, steps + 1):
        count = int(progress.count(schedule.chance(progress.steps, progress.steps_left)))
        assert count >= min(1, number - unmasked)
        expected = number * shift * (step / steps) / (1 + (shift - 1) * step / steps)
        ahead = unmasked - number * shift * ((step - 1) / steps) / (1 + (shift - 1) * (step - 1) / steps)
        unmasked += count
        assert expected - 1e-6 <= unmasked < expected + max(ahead, 0) + 1 or count == 1
        tokens[:, :unmasked] = 5
        progress.finish(tokens, post=NO_ROW, last=NO_ROW)
    assert unmasked == number


def test_an_even_split_is_the_shift_of_one():
    left = torch.arange(1, 40)
    even, near = (Schedule(length=64, tokens_per_step=1, steps=None, shift=shift) for shift in (1, 1 + 1e-12))
    torch.testing.assert_close(even.chance(left + 3, left), near.chance(left + 3, left))


@pytest.mark.parametrize("shift", [0, -1, float("inf"), float("nan")])
def test_a_shift_that_is_no_curve_is_refused(shift):
    with pytest.raises(ValueError, match="shift must be above 0"):
        Schedule(length=8, tokens_per_step=1, steps=None, shift=shift)
