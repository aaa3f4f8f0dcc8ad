"""Noise against SplitMix64 in plain Python, against its distributions, and its independence of batch and device."""

from __future__ import annotations

import hashlib

import pytest
import torch

from src.diffusion.noise import GOLDEN, Noise, splitmix

WORD = 2**64
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def split_mix_64(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % WORD
    return state ^ (state >> 31)


def test_the_generator_gives_the_published_numbers():
    """The first outputs of SplitMix64 for seed 1234567, as in the test vectors of the reference implementations."""
    states = 1234567 + torch.arange(1, 4) * GOLDEN
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(number) % WORD for number in splitmix(states)] == expected


@pytest.mark.parametrize("device", DEVICES)
def test_every_number_is_that_of_plain_integer_arithmetic(device):
    """A change of these values changes every run that was ever recorded: it must not happen."""
    noise, calls = Noise(["a", "b"], seed=3, passes=[0, 2], draw="x"), []
    where = torch.ones(2, 5, dtype=torch.bool, device=device)
    calls += [noise.uniform(where).double(), noise.uniform(where, dtype=torch.float64), noise.integers(where, 11)]
    for row, name in enumerate(("3/0/a/x", "3/2/b/x")):
        start = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        for position in range(5):
            bits = [
                split_mix_64((start + ((call << 42) + (position << 21)) * 0x9E3779B97F4A7C15) % WORD)
                for call in (1, 2, 3)
            ]
            expected = [(bits[0] >> 40) / 2**24, (bits[1] >> 11) / 2**53, (bits[2] >> 1) % 11]
            assert [float(values[row, position]) for values in calls] == expected


def test_numbers_are_uniform_and_independent():
    where = torch.ones(500, 400, dtype=torch.bool)
    noise = Noise([f"k{i}" for i in range(500)], seed=0)
    first, second = noise.uniform(where).double(), noise.uniform(where, dtype=torch.float64)
    total = first.numel()
    for values in (first, second):
        assert values.min() >= 0 and values.max() < 1
        counts = torch.histc(values.float(), bins=50, min=0, max=1).double()
        assert ((counts - total / 50) ** 2 / (total / 50)).sum() < 85.4  # 49 degrees of freedom, p = 0.001
    pairs = {
        "positions": (first[:, :-1], first[:, 1:]),
        "rows": (first[:-1], first[1:]),
        "calls": (first, second),
    }
    for name, (a, b) in pairs.items():
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 4 / total**0.5, name
    counts = torch.bincount(noise.integers(where, 7).flatten(), minlength=7).double()
    assert ((counts - total / 7) ** 2 / (total / 7)).sum() < 22.5  # 6 degrees of freedom, p = 0.001


def test_noise_levels_are_uniform_on_their_range():
    levels = Noise([f"k{i}" for i in range(4000)], seed=0).level(0.2)
    assert levels.min() >= 0.2 and levels.max() < 1
    assert abs(levels.mean() - 0.6) < 4 * 0.8 / 12**0.5 / 4000**0.5


def test_gumbel_noise_draws_in_proportion():
    """argmax(log p + Gumbel) has the distribution p."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    where = torch.ones(100, 200, dtype=torch.bool)
    parts = Noise([f"k{i}" for i in range(100)], seed=0).gumbel(where, 4)
    counts = torch.bincount(torch.cat([(probabilities.log() + part).argmax(-1) for part in parts]), minlength=4)
    expected = probabilities * where.numel()
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # 3 degrees of freedom, p = 0.001


def test_noise_differs_between_passes_draws_seeds_and_keys():
    where = torch.ones(1, 8, dtype=torch.bool)
    draws = [
        Noise([key], seed=seed, passes=[number], draw=draw).uniform(where)
        for key, seed, number, draw in (("a", 0, 0, 0), ("b", 0, 0, 0), ("a", 1, 0, 0), ("a", 0, 1, 0), ("a", 0, 0, 1))
    ]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == len(draws)
    assert torch.equal(draws[0], Noise(["a"], seed=0).uniform(where))


def test_a_number_does_not_depend_on_other_rows_positions_or_padding():
    keys = ["a", "b", "c"]
    everywhere, some = torch.ones(3, 9, dtype=torch.bool), torch.rand(3, 9) < 0.5
    some[:, 0] = True
    whole, part = Noise(keys, seed=0).uniform(everywhere), Noise(keys, seed=0).uniform(some)
    assert torch.equal(part[some], whole[some]) and (part[~some] == 1).all()
    assert torch.equal(Noise(["b"], seed=0).uniform(everywhere[1:2, :4]), whole[1:2, :4])
    gumbel = torch.cat(list(Noise(keys, seed=0).gumbel(everywhere, 6))).view(3, 9, 6)
    assert torch.equal(torch.cat(list(Noise(keys, seed=0).gumbel(some, 5))), gumbel[some][:, :5])


def test_a_row_that_asks_for_nothing_uses_up_no_call():
    """So the draws of a row do not depend on how many more calls another row of its batch makes."""
    alone, together = Noise(["a"], seed=0), Noise(["a", "b"], seed=0)
    where = torch.ones(2, 4, dtype=torch.bool)
    only_second = where & torch.tensor([[False], [True]])
    assert torch.equal(alone.uniform(where[:1]), together.uniform(where)[:1])
    together.uniform(only_second)
    list(together.gumbel(only_second, 3))
    assert torch.equal(alone.uniform(where[:1]), together.uniform(where)[:1])
