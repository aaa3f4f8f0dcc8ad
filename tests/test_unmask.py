"""Scores, policies and the draw of tokens: against formulas written out, frequencies, and rows on their own."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from src.diffusion.noise import Noise
from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.samplers.unmask import PART, Bernoulli, Factor, Threshold, log_probability, margin, negative_entropy, nucleus
from src.types import SpecialIds
from tests.backbones import Fixed, rows_of

MASK, EOS, EOT, V, L = 0, 1, 2, 12, 16
SPECIAL = SpecialIds(mask=MASK, eos=EOS, eot=EOT, banned=(MASK,), vocab_size=V)


def fixed(rows, *, length=L, scale=2.0):
    """A backbone that says the same of a position whatever stands elsewhere; each row has its own logits."""
    return Fixed(torch.randn(rows, length, V, generator=torch.Generator().manual_seed(0)) * scale)


def run(sampler, backbone, rows=range(1), seed=0):
    keys = [f"k{row}" for row in rows]
    return sampler(backbone, rows_of(rows), special=SPECIAL, keys=keys, seed=seed, trace=True)


def allowed(logits):
    """(L, V) float64 probabilities, as lists, of what may be written."""
    logits = logits.double().clone()
    logits[:, MASK] = -math.inf
    return logits.softmax(-1).tolist()


# --- scores ----------------------------------------------------------------------------------------------


def test_scores_in_parts_are_the_formulas():
    torch.manual_seed(0)
    logits = torch.randn(3 * PART, V) * 4
    logits[:, MASK] = -math.inf
    logits = logits[: 2 * PART + 7]
    proposal = torch.randint(1, V, (len(logits),))
    shares = logits.double().softmax(-1)
    probability, margins, entropies = log_probability(logits, proposal).exp(), margin(logits), negative_entropy(logits)
    torch.testing.assert_close(probability, shares[range(len(shares)), proposal], rtol=1e-12, atol=0)
    for share, difference, negative in zip(shares.tolist(), margins.tolist(), entropies.tolist(), strict=True):
        first, second = sorted(share, reverse=True)[:2]
        assert difference == pytest.approx(first - second, rel=1e-6)
        assert negative == pytest.approx(sum(p * math.log(p) for p in share if p), rel=1e-6)


@pytest.mark.parametrize(
    ("score", "temperature"),
    [("probability", 0.0), ("margin", 0.0), ("entropy", 0.0), ("margin", 5.0), ("entropy", 5.0)],
)
def test_the_order_of_unmasks_is_that_of_the_score(score, temperature):
    backbone = fixed(1)
    sampled = run(Sampler(length=L, score=score, temperature=temperature), backbone)
    values = []
    for share in allowed(backbone.logits[0]):
        ordered = sorted(share, reverse=True)
        values.append(
            {
                "probability": ordered[0],
                "margin": ordered[0] - ordered[1],
                "entropy": sum(p * math.log(p) for p in share if p),
            }[score]
        )
    assert [step.unmasked for step in sampled.traces[0]] == [[i] for i in sorted(range(L), key=lambda i: -values[i])]


def test_a_random_order_is_uniform_and_belongs_to_the_row():
    rows = 600
    sampled = run(Sampler(length=4, score="random"), fixed(rows, length=4), range(rows))
    counts = torch.zeros(4, 4)  # (step, place)
    for trace in sampled.traces:
        for number, step in enumerate(trace):
            counts[number, step.unmasked[0]] += 1
    expected = rows / 4
    assert float(((counts - expected) ** 2 / expected).sum()) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("score", ["probability", "margin", "entropy", "random"])
def test_the_end_of_the_text_is_last_by_any_score(score):
    backbone = fixed(1, scale=0.5)
    backbone.logits[0, ::2, EOS] = 3.0
    sampled = run(Sampler(length=L, score=score, eos_last=True), backbone)
    order = [step.unmasked[0] for step in sampled.traces[0]]
    ends = {place for place in range(L) if int(backbone.logits[0, place, 1:].argmax()) + 1 in (EOS, EOT)}
    assert set(order[L - len(ends) :]) == ends
    assert len(ends) >= L // 2


# --- policies --------------------------------------------------------------------------------------------


def test_the_factor_rule_by_enumeration():
    torch.manual_seed(1)
    confidence = torch.rand(40, L, dtype=torch.float64) ** 0.1
    eligible = torch.rand(40, L) < 0.7
    eligible[0] = False
    count = torch.ones(40, dtype=torch.int64)
    sizes = set()
    for factor in (0.1, 1.0, 2.5):
        policy = Factor(factor, scheduled=False)
        sampled = policy.select(confidence, eligible, count * 5, count.double(), Noise(["a"], seed=0))
        for row in range(40):
            places = sorted(eligible[row].nonzero()[:, 0].tolist(), key=lambda i: -float(confidence[row, i]))
            fits = [
                n for n in range(1, len(places) + 1) if (n + 1) * (1 - float(confidence[row, places[n - 1]])) < factor
            ]
            chosen = places[: max([1, *fits])]
            assert sorted(chosen) == sampled[row].nonzero()[:, 0].tolist()
            sizes.add(len(chosen))
    assert len(sizes) > 4
    one = Factor(0.1, scheduled=False).select(confidence, eligible, count * L, count.double(), Noise([], seed=0))
    assert (one.sum(1) < eligible.sum(1)).any()  # a schedule of one step
    scheduled = Factor(0.1).select(confidence, eligible, count * 5, count.double(), Noise([], seed=0))
    assert (scheduled.sum(1) >= eligible.sum(1).clamp(max=5)).all()


def test_ancestral_sampling_unmasks_each_mask_by_chance():
    rows, steps = 500, 8
    sampled = run(Sampler(length=L, steps=steps, unmask=Bernoulli()), fixed(rows), range(rows))
    for number in range(steps):
        masks = sum(
            trace[number - 1].tokens.count(MASK) if number else L for trace in sampled.traces if len(trace) > number
        )
        unmasked = sum(len(trace[number].unmasked) for trace in sampled.traces if len(trace) > number)
        chance = 1 / (steps - number)
        assert abs(unmasked - masks * chance) <= 4 * math.sqrt(masks * chance * (1 - chance)), number
    assert MASK not in sampled.ids


RANDOM = [
    {"unmask": Bernoulli()},
    {"unmask": Bernoulli(), "temperature": 1.0, "top_p": 0.8},
    {"score": "random", "tokens_per_step": 3},
    {"score": "random", "temperature": 0.7, "eos_last": True},
    {"unmask": Factor(1.0), "temperature": 1.0},
    {"unmask": Bernoulli(), "blocks": 4, "early_stop": "eot"},
]


@pytest.mark.parametrize("settings", RANDOM)
def test_a_row_is_the_same_alone_and_in_a_batch_and_under_the_seed(settings):
    sampler, backbone, rows = Sampler(length=L, **settings), fixed(5), range(5)
    together = run(sampler, backbone, rows)
    assert torch.equal(together.ids, run(sampler, backbone, rows).ids)
    for row in rows:
        alone = run(sampler, backbone, [row])
        assert alone.ids[0].tolist() == together.ids[row].tolist()
        assert alone.traces[0] == together.traces[row]
    other = run(sampler, backbone, rows, seed=1)
    assert [[s.unmasked for s in t] for t in other.traces] != [[s.unmasked for s in t] for t in together.traces]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"score": "entropie"}, "TopK needs a score of.*'entropie'"),
        ({"score": "entropy", "unmask": Threshold(0.9)}, "Threshold needs a score of"),
        ({"score": "margin", "unmask": Factor(1.0)}, "Factor needs a score of"),
        ({"score": "margin", "unmask": Bernoulli()}, "Bernoulli unmasks by chance.*'margin'"),
        ({"eos_last": True, "unmask": Bernoulli()}, "Bernoulli unmasks by chance.*eos_last=True"),
        ({"top_p": 0.9}, "1 at temperature 0, got 0.9"),
        ({"top_p": 0.0, "temperature": 1.0}, "got 0.0"),
        ({"top_p": 1.1, "temperature": 1.0}, "got 1.1"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Sampler(length=L, **settings)
    for policy, wrong in ((Threshold, 1.5), (Factor, 0)):
        with pytest.raises(ValueError, match=f"got {wrong}"):
            policy(wrong)


# --- nucleus ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
def test_the_nucleus_is_the_smallest_set_with_that_share(temperature, top_p):
    torch.manual_seed(2)
    logits = torch.randn(PART + 9, V) * 2
    kept = nucleus(logits.double(), temperature=temperature, top_p=top_p)
    for row, sampled in zip(logits, kept, strict=True):
        share = (row.double() / temperature).softmax(0).tolist()
        expected, total = set(), 0.0
        for token in sorted(range(V), key=lambda token: -share[token]):
            expected.add(token)
            total += share[token]
            if total >= top_p - 1e-12:
                break
        assert {token for token in range(V) if sampled[token] > -math.inf} == expected
        assert all(sampled[token] == row[token] for token in expected)


def test_tokens_come_from_the_nucleus_in_the_proportion_of_their_shares():
    row = torch.full((V,), -math.inf)
    row[[5, 6, 7, 8]] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    backbone = fixed(200)
    backbone.logits[:] = row
    sampled = run(Sampler(length=L, steps=1, temperature=1.0, top_p=0.6), backbone, range(200))
    observed = torch.stack([(sampled.ids == token).sum() for token in (5, 6)])
    expected = torch.tensor([4 / 7, 3 / 7]) * 200 * L
    assert int(observed.sum()) == 200 * L
    assert float(((observed - expected) ** 2 / expected).sum()) < 10.8  # chi-square, 1 degree of freedom, p = 0.001


# --- calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("reviser", [None, OverwriteAll()])
def test_calls_are_counted_as_they_are_made_and_no_text_is_asked_about_twice(cfg_scale, blocks, reviser):
    rows, each = 6, 2 if cfg_scale else 1
    backbone = fixed(rows, length=8)
    sampler = Sampler(length=8, steps=8, blocks=blocks, unmask=Bernoulli(), cfg_scale=cfg_scale, reviser=reviser)
    sampled = run(sampler, backbone, range(rows))
    read = [[text for row, text in backbone.texts if row == wanted] for wanted in range(rows)]
    assert sampled.forwards.tolist() == [len(texts) for texts in read]
    assert int(sampled.forwards.sum()) < sum(map(len, sampled.traces)) * each  # some steps unmasked nothing
    for row, trace in enumerate(sampled.traces):
        texts = read[row][::each]
        assert not any(a == b for a, b in pairwise(texts))
        before = [[MASK] * 8, *(step.tokens for step in trace)]
        changed = sum(a != b for a, b in pairwise(before))
        assert len(texts) <= changed
