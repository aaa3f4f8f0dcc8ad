"""How many tokens a step reveals, and where a text ends."""

from __future__ import annotations

import pytest
import torch

from src.diffusion.schedule import Progress, Schedule

MASK, EOT = 0, 2


@pytest.mark.parametrize(("number", "steps"), [(n, s) for n in (1, 2, 7, 10, 13) for s in (1, 2, 3, 7) if s <= n])
def test_reveals_are_an_even_split_with_the_remainder_first(number, steps):
    tokens = torch.full((1, number), MASK)
    progress = Progress(Schedule(length=number, tokens_per_step=None, steps=steps, blocks=1), tokens, MASK)
    counts, left = [], []
    while (tokens == MASK).any():
        progress.enter(tokens)
        left.append(int(progress.steps_left))
        counts.append(int(progress.take(tokens)))
        done = sum(counts)
        tokens[:, :done] = 5
    assert counts == [number // steps + (step < number % steps) for step in range(steps)]
    assert left == list(range(steps, 0, -1))
    assert int(progress.steps) == steps


def test_the_earliest_end_ever_seen_counts():
    tokens = torch.tensor([[5, MASK, 5, MASK, 5, MASK]] * 3)
    progress = Progress(Schedule(length=6, tokens_per_step=1, steps=None, blocks=3), tokens, MASK)
    progress.enter(tokens)
    assert progress.reach.tolist() == [[True] * 2 + [False] * 4] * 3
    for row, place in ((0, 4), (1, 2), (1, 5), (2, 0)):
        tokens[row, place] = EOT
    progress.stop_at(tokens, EOT)
    assert progress.stop.tolist() == [4, 2, 0]
    progress.stop_at(torch.where(tokens == EOT, 7, tokens), EOT)
    progress.stop_at(torch.tensor([[5, 5, 5, 5, 5, EOT], [5, EOT, 5, 5, 5, 5], [5] * 6]), EOT)
    assert progress.stop.tolist() == [4, 1, 0]
    assert progress.reach.sum(1).tolist() == [4, 1, 0]
    assert [row.nonzero()[:, 0].tolist() for row in progress.wanted(tokens)] == [[1, 3], [], []]
