"""The samplers that start from noise: transitions against enumeration, marginals against the schedule, and the rest."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from src.samplers.uniform import Jumps, Posterior, pick
from src.types import SpecialIds
from tests.backbones import Fixed, rows_of

MASK, EOS, EOT, BOS, ROLE = 0, 1, 2, 3, 8
V = 9
SPECIAL = SpecialIds(mask=MASK, eos=EOS, eot=EOT, banned=(BOS,), vocab_size=V, unwritten=(ROLE,))
STATES = [1, 2, 4, 5, 6, 7]
K = len(STATES)
NOISE = [0.0, 0.0, 0.25, 0.25, 0.25, 0.25]  # the end of a text is never noise
P = [0.05, 0.1, 0.4, 0.25, 0.0, 0.2]  # of the states
BOTH = (Posterior, Jumps)


class Guided(Fixed):
    """Says nothing without the prefix."""

    def encode_prefix(self, inputs):
        return rows_of([len(self.logits) - 1] * len(inputs["prompt_ids"]))


def sample(sampler, backbone, rows=(0,), **settings):
    settings = {"special": SPECIAL, "keys": [f"k{i}" for i in rows], "seed": 0} | settings
    return sampler(backbone, rows_of(rows), **settings)


def said(share, length):
    """(1, L, V) logits that make `share` of the states at each place, and the ids that are no states likely."""
    logits = torch.full((V,), 20.0)
    logits[STATES] = torch.tensor(share).log()
    return logits.expand(1, length, V)


def posterior(share, z, t, s):
    """P(state at s | state z at t): the sum of P(s | x0, z) over all x0, which have the probabilities `share` given z.

    Only that a state z which is the end of a text might be noise as well.
    """
    noise = NOISE if NOISE[z] else [0.25] * K
    kept, later = 1 - s, (1 - t) / (1 - s)
    sampled = [0.0] * K
    for x in range(K):
        bridge = [
            (kept * (x == k) + (1 - kept) * NOISE[k]) * (later * (k == z) + (1 - later) * noise[z]) for k in range(K)
        ]
        sampled = [total + share[x] * part / sum(bridge) for total, part in zip(sampled, bridge, strict=True)]
    return sampled


def euler(share, z, t, s):
    """The same for a jump to x1 ~ share with probability 1 - exp(-h / (1 - kappa)), and always in the last step."""
    jump = 1.0 if s == 0 else 1 - math.exp(-(t - s) / t)
    return [jump * share[k] + (1 - jump) * (k == z) for k in range(K)]


RULES = {Posterior: posterior, Jumps: euler}


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("share", [P, [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
def test_transitions_are_those_of_all_paths(kind, share):
    steps = 5
    sampler = kind(length=8, steps=steps)
    for left, z in product(range(1, steps + 1), range(K)):
        given = torch.tensor([share], dtype=torch.float64), torch.tensor([z]), torch.tensor(NOISE) > 0
        weight = sampler.transition(*given, left=left, steps=steps)[0]
        expected = RULES[kind](share, z, left / steps, (left - 1) / steps)
        assert (weight / weight.sum()).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sure_model_gets_its_text_and_the_way_there_follows_the_schedule(kind, temperature):
    length, steps = 8000, 6
    target = torch.tensor([4, 5, 6, 7] * (length // 4))
    logits = torch.full((1, length, V), -1e4)
    logits[0, torch.arange(length), target] = 1e4
    sampled = sample(kind(length=length, steps=steps, temperature=temperature), Fixed(logits), trace=True)
    assert sampled.ids.tolist() == [target.tolist()]
    untouched = 1.0
    for done, step in enumerate(sampled.traces[0], start=1):
        left = steps - done
        # a_s = 1 - s. Euler steps lag behind: a place is untouched where it has never jumped
        untouched = left / steps if kind is Posterior else untouched * math.exp(-1 / (left + 1)) * (left > 0)
        share = 1 - untouched + untouched / 4
        right = (torch.tensor(step.tokens) == target).double().mean().item()
        assert right == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / length) + 1e-12)


@pytest.mark.parametrize("kind", BOTH)
def test_a_row_does_not_depend_on_the_others(kind):
    torch.manual_seed(0)
    table = 2 * torch.randn(3, 12, V)
    sampler = kind(length=12, tokens_per_step=3)
    together = sample(sampler, Fixed(table), rows=(0, 1, 2))
    again = sample(sampler, Fixed(table), rows=(2, 0))
    for row, place in ((2, 0), (0, 1)):
        assert together.ids[row].tolist() == again.ids[place].tolist()
    assert sample(sampler, Fixed(table), rows=(0, 1, 2), seed=1).ids.tolist() != together.ids.tolist()


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(("scale", "calls"), [(0.0, 1), (1.5, 2)])
def test_each_forward_call_is_counted(kind, scale, calls):
    backbone = Fixed(torch.zeros(2, 10, V))
    sampled = sample(kind(length=10, tokens_per_step=3, cfg_scale=scale), backbone, rows=(0, 1), trace=True)
    assert sampled.forwards.tolist() == [4 * calls] * 2
    assert len(backbone.texts) == 2 * 4 * calls
    assert [step.forwards for step in sampled.traces[0]] == [calls * n for n in range(1, 5)]
    assert [len(steps) for steps in sampled.traces] == [4, 4]
    assert sampled.edits.tolist() == [sum(len(step.rewritten) for step in steps) for steps in sampled.traces]
    assert not sampled.remasks.any()


def test_guidance_sharpens_what_the_prefix_says():
    """Twice the log ratio to an unguided prefix that says nothing is the square of the probabilities."""
    length = 20000
    squares = [p * p / sum(q * q for q in P) for p in P]
    sampled = sample(
        Posterior(length=length, steps=1, cfg_scale=1.0),
        Guided(torch.cat([said(P, length), torch.zeros(1, length, V)])),
        trace=True,
    )
    counts = torch.tensor(sampled.traces[0][-1].tokens).bincount(minlength=V)
    for state, share in zip(STATES, squares, strict=True):
        assert float(counts[state]) == pytest.approx(length * share, abs=4 * math.sqrt(length * share * (1 - share)))


def test_what_has_no_share_is_never_drawn():
    weight = torch.tensor([[0.0, 2.0, 0.0, 2.0, 0.0]], dtype=torch.float64).repeat(4, 1)
    chance = torch.tensor([0.0, 0.49, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert pick(weight, chance).tolist() == [1, 1, 3, 3]


class Knows(Fixed):
    """The best network there can be for places that know nothing of each other: Bayes on the noise it has seen."""

    def __init__(self, law, sampler):
        super().__init__(torch.zeros(1, sampler.length, V))
        self.law, self.steps, self.left = law, sampler.steps, sampler.steps

    def __call__(self, prefix, tokens, **settings):
        intact = 1 - self.left / self.steps
        self.left -= 1
        seen = torch.tensor([[intact * (x == z) + (1 - intact) * NOISE[z] for x in range(K)] for z in range(K)])
        logits = torch.full((*tokens.shape, V), -1e4)
        logits[..., STATES] = (seen[torch.searchsorted(torch.tensor(STATES), tokens)] * torch.tensor(self.law)).log()
        self.logits = logits.clamp(min=-1e4)
        return super().__call__(prefix, tokens, **settings)


@pytest.mark.parametrize(("kind", "steps", "slack"), [(Posterior, 4, 0.0), (Posterior, 32, 0.0), (Jumps, 64, 0.02)])
def test_the_best_network_gives_the_law_of_the_data(kind, steps, slack):
    """From any number of steps the posterior does; Euler steps come close."""
    law = [0.0, 0.0, 0.6, 0.25, 0.1, 0.05]
    length = 20000
    sampler = kind(length=length, steps=steps)
    sampled = sample(sampler, Knows(law, sampler), trace=True)
    counts = torch.tensor(sampled.traces[0][-1].tokens).bincount(minlength=V)  # before the text is cut at an eot
    assert counts[[MASK, BOS, ROLE]].sum() == 0
    for state, share in zip(STATES, law, strict=True):
        assert float(counts[state]) / length == pytest.approx(
            share, abs=slack + 4 * math.sqrt(share * (1 - share) / length)
        )
