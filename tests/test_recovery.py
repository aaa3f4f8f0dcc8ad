"""Recovery: a model whose repairs are known, counted by brute force from the texts that it reads."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import one_hot

from src.metrics.recovery import Recovery
from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.types import Batch, Prefix, SpecialIds

V, EOS, EOT, MASK = 40, 0, 1, 2
SPECIAL = SpecialIds(mask=MASK, eos=EOS, eot=EOT, banned=(3,), vocab_size=V)
LENGTHS = [20, 9, 3, 14]  # tokens of the texts, without eot
L = 24


def batch_of(lengths: list[int]) -> Batch:
    """Texts of ids 10 to 19; the first two tokens of all but the last are a span that could be 20, 21."""
    rows = [[10 + (row + place) % 10 for place in range(n)] + [EOT] for row, n in enumerate(lengths)]
    response = torch.tensor([row + [EOS] * (L - len(row)) for row in rows])
    flawed, span = response.clone(), torch.zeros_like(response)
    flawed[:-1, :2], span[:-1, :2] = torch.tensor([20, 21]), 1
    true = torch.ones_like(response, dtype=torch.bool)
    keys = [f"key-{row}" for row in range(len(lengths))]
    return Batch({}, response, true, flawed, span, torch.zeros(len(lengths), dtype=torch.bool), keys=keys)


class Repairs:
    """Restores what is wrong at even places, leaves the rest, and turns the right token at place 5 into 30."""

    def __init__(self, batch: Batch) -> None:
        self.response, self.texts = batch.response, list[torch.Tensor]()

    def encode_prefix(self, prefix):
        return Prefix(torch.arange(len(self.response), dtype=torch.float32)[:, None, None])

    def __call__(self, prefix, tokens, *, attend=None, positions=None):
        true = self.response[prefix.embeds[:, 0, 0].long()]
        even = torch.arange(L) % 2 == 0
        says = torch.where(even, true, tokens)
        says[:, 5] = torch.where((tokens[:, 5] == true[:, 5]) & (true[:, 5] >= 10), 30, says[:, 5])
        self.texts.append(tokens.clone())
        logits = one_hot(says, V).float()
        return logits if positions is None else logits[positions]


def test_shares_are_those_of_a_count_by_hand():
    batch, wrong = batch_of(LENGTHS), [1, 2, 4, 8]
    model = Repairs(batch)
    sampler = Sampler(length=L, reviser=OverwriteAll(), post_steps=1)
    metric = Recovery(special=SPECIAL, sampler=sampler, wrong=wrong)
    metric.update(model, batch)
    stats = metric.compute()
    assert len(model.texts) == 5  # a pass over the texts of each number of mistakes, and of the false facts
    for name, texts in zip([*wrong, "a fact"], model.texts, strict=True):
        fixed = planted = broken = right = 0
        for row, (text, true) in enumerate(zip(texts.tolist(), batch.response.tolist(), strict=True)):
            places = [place for place in range(L) if text[place] != true[place]]
            expected = [0, 1] * (row < 3) if name == "a fact" else [*range(min(int(name), LENGTHS[row]))]
            assert len(places) == len(expected) and all(place < LENGTHS[row] for place in places)
            assert name != "a fact" or places == expected
            assert not {text[place] for place in places} & {EOS, EOT, MASK, 3}
            fixed += sum(place % 2 == 0 for place in places)
            planted += len(places)
            right += LENGTHS[row] + 1 - len(places)
            broken += LENGTHS[row] > 5 and 5 not in places
        for title, share, count in (("repaired", fixed / planted, planted), ("broken", broken / right, right)):
            stat = stats[f"{title} by wrong tokens={name}"]
            assert (stat["mean"], stat["n"]) == (pytest.approx(share), count) and 0 < share < 1


def test_what_is_planted_is_a_function_of_key_and_seed():
    """Two halves add up to the whole, other seeds plant other mistakes, and a text without swaps has no false fact."""
    batch = batch_of(LENGTHS)
    sampler = Sampler(length=L, reviser=OverwriteAll(), post_steps=1)
    texts = {}
    for seed, parts in ((0, [batch]), (0, batch.split(2)), (1, [batch])):
        metric, seen = Recovery(special=SPECIAL, sampler=sampler, wrong=[3], seed=seed), []
        for part in parts:
            model = Repairs(part)
            metric.update(model, part)
            seen.append(model.texts[0])
        texts.setdefault(seed, []).append((torch.cat(seen).tolist(), metric.compute()))
    assert texts[0][0] == texts[0][1] and texts[0][0][0] != texts[1][0][0]
    alone = Recovery(special=SPECIAL, sampler=sampler, wrong=[1])
    alone.update(Repairs(last := batch.rows(slice(3, 4))), last)
    stat = alone.compute()["repaired by wrong tokens=a fact"]
    assert stat["n"] == 0 and stat["mean"] != stat["mean"]
