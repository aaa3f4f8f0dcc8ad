"""The validation bound against enumerations: of all masks, of all orders, and of all draws of a stratum."""

from __future__ import annotations

import math
import statistics
from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from src.diffusion.noise import Noise
from src.metrics.bound import LEAST, Bound, hide_count, response_nats
from src.types import Batch, Prefix, SpecialIds

MASK, WIDTH = 4, 7  # a head that is wider than the vocabulary of five tokens
SPECIAL = SpecialIds(mask=MASK, eos=0, eot=1, banned=(MASK,), vocab_size=5)
TEXT = (2, 3, 3, 1)


class Table:
    """A backbone that is a table: a masked response -> random logits, the same whatever else is in the batch."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    def row(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """(L, WIDTH) logits."""
        if tokens not in self.known:
            generator = torch.Generator().manual_seed(sum(t * 11**i for i, t in enumerate(tokens)) + 1)
            self.known[tokens] = 2 * torch.randn(len(tokens), WIDTH, generator=generator)
        return self.known[tokens]

    def encode_prefix(self, prefix) -> Prefix:
        return Prefix(torch.zeros(len(prefix["prompt_ids"]), 1, 1))

    def __call__(self, prefix, tokens, *, attend=None, positions=None):
        shown = tokens if attend is None else tokens.masked_fill(~attend, 0)
        logits = torch.stack([self.row(tuple(row)) for row in shown.tolist()])
        return logits if positions is None else logits[positions]


class Uniform(Table):
    def row(self, tokens):
        return torch.zeros(len(tokens), WIDTH)


def batch_of(texts, keys, *, length=None) -> Batch:
    """Rows of `texts`, filled with end of text that is not editable."""
    length = length or max(map(len, texts))
    response = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])
    editable = torch.tensor([[i < len(text) for i in range(length)] for text in texts])
    return Batch(
        {"prompt_ids": torch.zeros(len(texts), 1, dtype=torch.int64)}, response, editable, response,
        torch.zeros_like(response), torch.zeros(len(texts), dtype=torch.bool), list(keys),
    )  # fmt: skip


def nats_at(text, hidden) -> dict[int, float]:
    """-log p of each hidden token, over the ids that are neither the mask nor beyond the vocabulary."""
    row = Table().row(tuple(MASK if i in hidden else t for i, t in enumerate(text))).double()
    real = [0, 1, 2, 3]
    return {i: float(row[i, real].logsumexp(0) - row[i, text[i]]) for i in hidden}


def sets_of(text, size) -> list[float]:
    """The summed cross-entropy of each set of so many hidden tokens."""
    return [sum(nats_at(text, hidden).values()) for hidden in combinations(range(len(text)), size)]


def exact(text) -> float:
    """Over k uniform and all sets of k tokens, n/k times the cross-entropy."""
    n = len(text)
    return sum(n / k * statistics.mean(sets_of(text, k)) for k in range(1, n + 1)) / n


def many(draws, rows, estimator="count", text=TEXT) -> torch.Tensor:
    batch = batch_of([text] * rows, [f"key-{i}" for i in range(rows)])
    return response_nats(Table(), batch, special=SPECIAL, draws=draws, seed=0, estimator=estimator)


def test_the_definition_is_the_mean_over_all_orders():
    """The bound of a masked model is that of an autoregressive one in a random order, which needs no weights at all."""
    orders = list(permutations(range(len(TEXT))))
    total = 0.0
    for order in orders:
        total += sum(nats_at(TEXT, set(order[i:]))[order[i]] for i in range(len(order)))
    assert exact(TEXT) == pytest.approx(total / len(orders), rel=1e-6)


def test_it_is_unbiased_and_each_draw_hides_other_tokens():
    """Draws of one order alone would end at the cost of that order."""
    nats = many(3, 3000)
    assert abs(float(nats.mean()) - exact(TEXT)) < 4 * float(nats.std()) / math.sqrt(len(nats))
    nats = many(600, 6)
    assert nats.tolist() == pytest.approx([exact(TEXT)] * 6, rel=0.06)
    assert float(nats.std()) > 0


def test_the_plain_estimator_estimates_the_same_from_its_least_t_on():
    n, ts = len(TEXT), np.linspace(LEAST, 1, 200_001)
    rates = [np.trapezoid(ts ** (k - 1) * (1 - ts) ** (n - k), ts) for k in range(1, n + 1)]
    expected = sum(rate * sum(sets_of(TEXT, k)) for k, rate in zip(range(1, n + 1), rates, strict=True)) / (1 - LEAST)
    assert expected == pytest.approx(exact(TEXT), rel=0.02)
    nats = many(4, 6000, "iid")
    assert abs(float(nats.mean()) - expected) < 4 * float(nats.std()) / math.sqrt(len(nats))
    assert float(many(4, 1500).var()) < 0.3 * float(nats.var())  # what the estimator `count` is for


def test_as_many_draws_as_tokens_hide_every_number_once():
    text = (2, 3, 2, 3, 2, 3, 1)
    batch = batch_of([text, text[:4]], ["a", "b"])
    offset = Noise(batch.keys, seed=5, draw="bound").level().double()
    sizes = []
    for draw in range(7):
        noise = Noise(batch.keys, seed=5, draw=f"bound/{draw}")
        hidden, weight = hide_count(batch.editable, noise, (offset + draw) / 7)
        assert not (hidden & ~batch.editable).any()
        assert weight.tolist() == [7 / int(hidden[0].sum()), 4 / int(hidden[1].sum())]
        sizes.append(hidden.sum(1).tolist())
    assert [size for size, _ in sizes] == [1, 2, 3, 4, 5, 6, 7]
    assert {size for _, size in sizes} == {1, 2, 3, 4}


def test_a_response_does_not_depend_on_its_batch_but_on_key_and_seed():
    texts = [TEXT, TEXT[1:], (2, 1)]
    settings = {"special": SPECIAL, "draws": 5}
    together = response_nats(Table(), batch_of(texts, "abc", length=6), seed=0, **settings)
    batches = [batch_of([text], key, length=6) for text, key in zip(texts, "abc", strict=True)]
    assert together.tolist() == [float(response_nats(Table(), batch, seed=0, **settings)) for batch in batches]
    for other in (batch_of(texts, "xbc", length=6), batch_of(texts, "abc", length=6)):
        changed = response_nats(Table(), other, seed=int(other.keys[0] == "a"), **settings)
        assert changed[0] != together[0]


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary():
    metric = Bound(special=SPECIAL, draws=2, seed=3)
    metric.update(Uniform(), batch_of([TEXT, (2, 1)], "ab"))
    stats = metric.compute()
    assert stats["nelbo"] == {"mean": pytest.approx(math.log(4)), "se": pytest.approx(0, abs=1e-6), "n": 2}
    assert stats["bits"]["mean"] == pytest.approx(2)
    assert stats["perplexity"]["mean"] == pytest.approx(4)


def test_sums_over_tokens_and_their_errors_by_hand():
    texts, keys = [TEXT, (2, 3, 1), (3, 1), TEXT[::-1], (2, 2, 1)], "abcde"
    nats = response_nats(Table(), batch_of(texts, keys), special=SPECIAL, draws=4, seed=0).numpy()
    lengths = np.array([len(text) for text in texts])
    mean = nats.sum() / lengths.sum()
    residuals = nats - mean * lengths
    error = math.sqrt((residuals**2).sum() / 4 / 5) / lengths.mean()
    parts = [Bound(special=SPECIAL, draws=4) for _ in range(2)]
    parts[0].update(Table(), batch_of(texts[:2], keys[:2]))
    parts[1].update(Table(), batch_of(texts[2:], keys[2:]))
    parts[0].merge_state(parts[1])
    stats = parts[0].compute()
    assert stats["nelbo"] == {"mean": pytest.approx(mean), "se": pytest.approx(error), "n": 5}
    assert stats["bits"]["se"] == pytest.approx(error / math.log(2))
    assert stats["perplexity"]["se"] == pytest.approx(error * math.exp(mean))


def test_nothing_to_score_and_wrong_settings():
    empty = batch_of([()], "a", length=3)
    assert response_nats(Table(), empty, special=SPECIAL, draws=3, seed=0).tolist() == [0.0]
    metric = Bound(special=SPECIAL, draws=1)
    metric.update(Table(), empty)
    with pytest.raises(ValueError, match="no tokens"):
        metric.compute()
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        Bound(special=SPECIAL, draws=0)
