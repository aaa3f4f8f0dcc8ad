"""Corruptions against their definitions: rates within sampling error, exact labels, and independence of the batch."""

from __future__ import annotations

import pytest
import torch

from src.diffusion.corruption import (
    OPERATIONS,
    Absorb,
    Chain,
    Choose,
    EditNoise,
    Hybrid,
    Only,
    Replace,
    Span,
    start,
)
from src.diffusion.noise import Noise
from src.types import Batch, Kind, SpecialIds

SPECIAL = SpecialIds(mask=0, eos=1, eot=2, banned=(0, 3), vocab_size=40, unwritten=(4,))
ORDINARY = sorted(set(range(40)) - {0, 1, 2, 3, 4})


def make_batch(rows: int = 4, length: int = 12, *, padding: int = 3, seed: int = 0) -> Batch:
    """Random responses; row r has r % (padding + 1) padded positions, and two spans of two wrong tokens."""
    generator = torch.Generator().manual_seed(seed)
    response = torch.randint(5, 40, (rows, length), generator=generator)
    editable = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows):
        if row % (padding + 1):
            editable[row, -(row % (padding + 1)) :] = False
    flawed, span = response.clone(), torch.zeros_like(response)
    for number, first in ((1, 1), (2, 5)):
        span[:, first : first + 2] = number
        flawed[:, first : first + 2] = torch.where(response[:, first : first + 2] == 39, 5, 39)
    keys = [f"k{row}" for row in range(rows)]
    return Batch({}, response, editable, flawed, span, torch.zeros(rows, dtype=torch.bool), keys)


def run(corruption, batch: Batch, rate: float = 0.5, *, seed: int = 0):
    state = start(batch, torch.full((len(batch),), rate))
    return corruption(batch, state, Noise(batch.keys, seed=seed, passes=batch.passes))


def draft() -> Only:
    return Only(Span(num=None, kind=Kind.MISTAKE), rest=Kind.DRAFT)


def stage_one(**replace):
    return Chain(Absorb(special=SPECIAL), Replace(special=SPECIAL, **{"rate": 0.1, **replace}), Span())


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.95])
def test_absorb_hides_its_rate_of_the_editable_tokens(rate):
    batch = make_batch(400, 32)
    out = run(Absorb(special=SPECIAL), batch, rate)
    hidden = out.where(Kind.MASK)
    share = hidden.sum() / batch.editable.sum()
    assert abs(share - rate) < 4 * (rate * (1 - rate) / int(batch.editable.sum())) ** 0.5
    assert torch.equal(hidden, out.tokens == SPECIAL.mask)
    assert torch.equal(out.tokens[~hidden], batch.response[~hidden])


def test_replacements_have_their_rate_never_equal_the_original_and_cover_all_ordinary_ids():
    batch = make_batch(600, 32)
    out = run(Replace(special=SPECIAL, rate=0.3), batch)
    hit = out.where(Kind.SYNTAX)
    total = int(batch.editable.sum())
    assert abs(hit.sum() / total - 0.3) < 4 * (0.3 * 0.7 / total) ** 0.5
    assert (out.tokens[hit] != batch.response[hit]).all()
    counts = torch.bincount(out.tokens[hit], minlength=40)
    assert {i for i in range(40) if counts[i]} == set(ORDINARY)
    # Given the original, every other ordinary id is equally likely: chi-square over one original.
    drawn = out.tokens[hit & (batch.response == 7)]
    expected = len(drawn) / (len(ORDINARY) - 1)
    found = torch.bincount(drawn, minlength=40)[[i for i in ORDINARY if i != 7]]
    assert ((found - expected) ** 2 / expected).sum() < 70  # 33 degrees of freedom, p < 0.001 at 63.9


def test_replacements_from_the_response_come_from_the_same_row():
    batch = make_batch(50, 16)
    out = run(Replace(special=SPECIAL, rate=1.0, source="response"), batch)
    for row in range(len(batch)):
        own = set(batch.response[row][batch.editable[row]].tolist())
        assert set(out.tokens[row][out.where(Kind.SYNTAX)[row]].tolist()) <= own
    assert out.where(Kind.SYNTAX).sum() > 0.5 * batch.editable.sum()


def test_a_dynamic_rate_is_capped_by_the_noise_level():
    batch = make_batch(500, 32)
    out = run(Replace(special=SPECIAL, rate=0.3, dynamic=True), batch, 0.05)
    share = out.where(Kind.SYNTAX).sum() / batch.editable.sum()
    assert abs(share - 0.05) < 0.01


def test_frozen_positions_never_change():
    batch = make_batch(64, 12)
    for corruption in (
        stage_one(),
        Chain(Span(num=None)),
        draft(),
        Replace(special=SPECIAL, rate=1.0, source="response"),
    ):
        out = run(corruption, batch, 0.7)
        assert torch.equal(out.tokens[~batch.editable], batch.response[~batch.editable])
        assert (out.kind[~batch.editable] == int(Kind.FROZEN)).all()
        assert (out.kind[batch.editable] != int(Kind.FROZEN)).all()


def test_one_span_a_row_where_the_text_is_still_visible():
    batch = make_batch(64, 12)
    out = run(stage_one(rate=0.0), batch, 0.3)
    hit = out.where(Kind.HALLUCINATION)
    assert torch.equal(out.tokens[hit], batch.flawed[hit])
    assert (out.tokens[hit] != batch.response[hit]).all()
    assert not (hit & out.where(Kind.MASK)).any()
    chosen = [set(batch.span[row][hit[row]].tolist()) for row in range(len(batch))]
    assert all(len(found) <= 1 for found in chosen)
    assert {1} in chosen and {2} in chosen  # both spans get their turn


def test_a_draft_is_shown_and_its_mistakes_are_marked():
    batch = make_batch(8, 12)
    out = run(draft(), batch)
    assert torch.equal(out.tokens[batch.editable], batch.flawed[batch.editable])
    assert torch.equal(out.where(Kind.MISTAKE), (batch.span > 0) & batch.editable)
    assert torch.equal(out.where(Kind.DRAFT), (batch.span == 0) & batch.editable)


def test_choose_gives_each_row_its_own_corruption():
    batch = make_batch(6, 12)
    batch.drafted[::2] = True
    out = run(Choose(when="drafted", then=draft(), otherwise=Absorb(special=SPECIAL)), batch, 0.5)
    assert not out.where(Kind.MASK)[::2].any() and out.where(Kind.MISTAKE)[::2].any()
    assert out.where(Kind.MASK)[1::2].any() and not out.where(Kind.MISTAKE)[1::2].any()


def test_choose_takes_its_share_of_the_rows_that_qualify():
    batch = make_batch(600, 12)
    batch.span[::3] = 0
    out = run(
        Choose(when="spans", then=Only(Span(), rest=Kind.FROZEN), otherwise=Absorb(special=SPECIAL), share=0.6), batch
    )
    alone = out.where(Kind.HALLUCINATION).any(1)
    assert not alone[::3].any()
    assert abs(alone.sum() / 400 - 0.6) < 4 * (0.24 / 400) ** 0.5
    assert not out.where(Kind.MASK)[alone].any() and out.where(Kind.MASK)[~alone].any(1).float().mean() > 0.9
    assert (out.where(Kind.HALLUCINATION)[alone].sum(1) == 2).all()  # one of the two spans


def test_a_sample_gets_the_same_noise_in_any_batch_with_any_padding():
    batch = make_batch(5, 12)
    whole = run(stage_one(), batch, 0.4)
    for row in range(len(batch)):
        alone = batch.rows(slice(row, row + 1))
        kept = int(alone.editable.sum())
        trimmed = Batch({}, *(getattr(alone, n)[:, :kept] for n in ("response", "editable", "flawed", "span")),
                        alone.drafted, alone.keys)  # fmt: skip
        out = run(stage_one(), trimmed, 0.4)
        assert torch.equal(out.tokens[0], whole.tokens[row, :kept])
        assert torch.equal(out.kind[0], whole.kind[row, :kept])


def with_text(rows: int, length: int) -> Batch:
    """A batch whose row r is a text of 4 + r % 5 tokens, then eot, then end-of-text filler."""
    batch = make_batch(rows, length, padding=0)
    for row in range(rows):
        end = 4 + row % 5
        batch.response[row, end], batch.response[row, end + 1 :] = SPECIAL.eot, SPECIAL.eos
    batch.flawed, batch.span = batch.response.clone(), torch.zeros_like(batch.span)
    return batch


@pytest.mark.parametrize("corruption", ["uniform", "response", "edits"])
def test_replacements_stay_inside_the_text_and_write_no_end_of_text(corruption):
    batch = with_text(200, 20)
    ends = (batch.response == SPECIAL.eot).int().argmax(1, keepdim=True)
    inside = torch.arange(20) <= ends
    if corruption == "edits":
        out = run(EditNoise(special=SPECIAL, rate=1.0), batch)
    else:
        out = run(Replace(special=SPECIAL, rate=1.0, source=corruption), batch)
        assert not torch.isin(out.tokens[out.where(Kind.SYNTAX)], torch.tensor([SPECIAL.eos, SPECIAL.eot])).any()
    assert torch.equal(out.tokens[~inside], batch.response[~inside])
    assert out.where(Kind.SYNTAX)[inside].float().mean() > 0.4
    everywhere = run(Replace(special=SPECIAL, rate=1.0, filler=True), batch)
    assert everywhere.where(Kind.SYNTAX)[~inside].all()  # the released code


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Replace(special=SPECIAL, rate=1.5), "1.5"),
        (lambda: Replace(special=SPECIAL, rate=0.1, source="bigram"), "bigram"),
        (lambda: Span(num=0), "0"),
        (lambda: Choose(when="sometimes", then=draft(), otherwise=draft()), "sometimes"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# hybrid noise and edits


@pytest.mark.parametrize(("t", "share"), [(0.5, 0.2), (0.2, 0.1), (0.9, 0.5), (0.5, 0.0)])
def test_hybrid_noise_has_the_marginals_of_its_process(t, share):
    """GIDD's q(z | x) with g = 1; at t = 1/2 the random tokens have their `share`."""
    batch = make_batch(500, 32)
    out = run(Hybrid(special=SPECIAL, share=share), batch, t)
    c = 2 * share / (1 - share) * (t * (1 - t)) ** 0.5
    number = int(batch.editable.sum())
    for kind, expected in ((Kind.CLEAN, 1 - t), (Kind.MASK, t), (Kind.SYNTAX, c)):
        p = expected / (1 + c)
        found = (out.where(kind) & batch.editable).sum().item() / number
        assert abs(found - p) <= 4 * (p * (1 - p) / number) ** 0.5
    if t == 0.5:
        assert c / (1 + c) == pytest.approx(share)
    assert torch.equal(out.where(Kind.MASK), out.tokens == SPECIAL.mask)
    wrong = out.where(Kind.SYNTAX)
    assert (out.tokens[wrong] != batch.response[wrong]).all()
    assert torch.equal(out.tokens[~batch.editable], batch.response[~batch.editable])


def levenshtein(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_edit_is_bounded_and_labelled(operation):
    batch = make_batch(300, 20)
    out = run(EditNoise(special=SPECIAL, rate=0.3, operations=[operation], window=3), batch)
    changed = out.tokens != batch.response
    assert torch.equal(changed, out.where(Kind.SYNTAX)) and not changed[~batch.editable].any()
    counts = []
    for row in range(300):
        n = int(batch.editable[row].sum())
        distance = levenshtein(batch.response[row, :n].tolist(), out.tokens[row, :n].tolist())
        assert distance <= 2 * int(0.3 * n)  # each costs at most a deletion and an insertion
        counts.append(int(changed[row].sum()) / n)
        if operation == "swap":
            assert sorted(out.tokens[row, :n].tolist()) == sorted(batch.response[row, :n].tolist())
        if operation == "duplicate":
            assert set(out.tokens[row, :n].tolist()) <= set(batch.response[row, :n].tolist())
        if operation == "substitute":
            assert distance <= int(0.3 * n)
    assert 0.02 < sum(counts) / 300 < 0.6
    assert min(counts) == 0 < max(counts)  # the number of edits is uniform from none


@pytest.mark.parametrize("corruption", [Hybrid(special=SPECIAL, share=0.3), EditNoise(special=SPECIAL, rate=0.5)])
def test_a_row_is_damaged_in_the_same_way_alone(corruption):
    batch = make_batch(6)
    whole = run(corruption, batch).tokens
    assert torch.equal(whole, torch.cat([run(corruption, part).tokens for part in batch.split(1)]))


def test_wrong_numbers_of_hybrid_noise_and_edits_are_refused():
    with pytest.raises(ValueError, match="less than 1, got 1"):
        Hybrid(special=SPECIAL, share=1)
    for options in ({"rate": 2}, {"rate": 0.1, "operations": ["drop"]}, {"rate": 0.1, "window": 0}):
        with pytest.raises(ValueError, match=str(next(reversed(options.values())))[1:-1] or "got"):
            EditNoise(special=SPECIAL, **options)
