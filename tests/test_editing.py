"""Threshold editing and token to mask: against loops written out, and against the samplers that they contain."""

from __future__ import annotations

import math

import pytest
import torch

from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.samplers.token_edit import ThresholdEdit, TokenToMask
from src.samplers.unmask import Threshold
from src.types import SpecialIds
from tests.backbones import Table, rows_of

MASK, EOS, BAD, V, LENGTH = 0, 1, 3, 16, 12
SPECIAL = SpecialIds(mask=MASK, eos=EOS, eot=V, banned=(BAD,), vocab_size=V)
ROWS = 4


def table():
    """The surer and the less attentive to its text, the higher the row."""
    sharp, listens = (1.0, 2.0, 3.0, 4.0), (1.2, 1.0, 0.8, 0.5)
    return Table(vocab_size=V, length=LENGTH, seed=8, sharp=sharp, listens=listens, likely=[MASK, BAD], bonus=1.0)


def sample(sampler, backbone=None, rows=range(ROWS), **settings):
    settings = {"special": SPECIAL, "keys": [str(row) for row in rows], "seed": 0, "trace": True} | settings
    return sampler(backbone or table(), rows_of(rows), **settings)


def probabilities(logits):
    """For each place a dict id -> probability; the mask has a share, a banned id has none."""
    rows = [[float(value) for value in row] for row in logits]
    shares = [{v: math.exp(value - max(row)) for v, value in enumerate(row) if v != BAD} for row in rows]
    return [{v: part / sum(share.values()) for v, part in share.items()} for share in shares]


def best(share):
    return max((v for v in share if v != MASK), key=lambda v: share[v])


def unmask(x, shares, hidden, tau):
    """The masks that are surer than tau, or the surest one."""
    sure = {i: shares[i][best(shares[i])] for i in hidden}
    for i in [i for i in hidden if sure[i] >= tau] or [max(hidden, key=lambda i: sure[i])]:
        x[i] = best(shares[i])


def edit_by_hand(say, *, blocks, tau_mask, tau_edit, most):
    """LLaDA2.1: unmask and edit from the same logits; a full block is edited until nothing changes.

    Returns the text and the forward calls, where the one that finds nothing to change serves the next block as well.
    """
    x, calls = [MASK] * LENGTH, 0

    def shares():
        nonlocal calls
        calls += 1
        return probabilities(say(x))

    def edited(said, places):
        new = {i: best(said[i]) for i in places}
        return [i for i in places if new[i] != x[i] and said[i][new[i]] > tau_edit]

    for block in range(blocks):
        places = range(block * LENGTH // blocks, (block + 1) * LENGTH // blocks)
        while hidden := [i for i in places if x[i] == MASK]:
            said = shares()
            wrong = edited(said, [i for i in places if x[i] != MASK])
            unmask(x, said, hidden, tau_mask)
            for i in wrong:
                x[i] = best(said[i])
        last = block + 1 == blocks
        for _ in range(most):
            said = shares()
            wrong = edited(said, range(LENGTH) if last else places)
            if not wrong:
                calls -= not last
                break
            for i in wrong:
                x[i] = best(said[i])
    return x, calls


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize(("tau_mask", "tau_edit"), [(0.7, 0.5), (0.5, 0.0), (0.3, 0.2)])
@pytest.mark.parametrize("most", [2, 16])
def test_it_is_the_loop_written_out(blocks, tau_mask, tau_edit, most):
    backbone = table()
    reviser = ThresholdEdit(tau=tau_edit, block_passes=most)
    unmask = Threshold(tau_mask, scheduled=False)
    sampler = Sampler(length=LENGTH, blocks=blocks, unmask=unmask, reviser=reviser, post_steps=most)
    sampled = sample(sampler, backbone)
    assert backbone.rows == int(sampled.forwards.sum())
    loops = 0
    for row in range(ROWS):
        text, calls = edit_by_hand(
            lambda x, row=row: backbone.say(row, x), blocks=blocks, tau_mask=tau_mask, tau_edit=tau_edit, most=most
        )
        steps = [step.tokens for step in sampled.traces[row]]
        if steps[-1] in steps[:-2]:  # the sampler also stops where a text comes back, which the loop does not
            loops += 1
            continue
        assert steps[-1] == text
        assert int(sampled.forwards[row]) == calls
    assert loops < ROWS
    assert sampled.edits.sum() > 0


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("unmask", [None, Threshold(0.4, scheduled=False)])
def test_it_never_edits_at_one_and_rewrites_all_at_zero(blocks, unmask):
    settings = {"length": LENGTH, "steps": 6, "blocks": blocks, "unmask": unmask}
    for tau, scope, same in (
        (1.0, "block", {}),
        (1.0, "all", {}),
        (0.0, "block", {"reviser": OverwriteAll(), "post_steps": 3}),
        (0.0, "all", {"reviser": OverwriteAll(scope="all"), "post_steps": 3}),
    ):
        post = {"post_steps": same["post_steps"]} if same else {}
        sampled = sample(Sampler(**settings, reviser=ThresholdEdit(tau=tau, scope=scope), **post))
        expected = sample(Sampler(**settings, **same))
        assert sampled.traces == expected.traces
        assert torch.equal(sampled.ids, expected.ids)
        assert torch.equal(sampled.forwards, expected.forwards)
    assert expected.edits.sum() > 0


def mask_by_hand(say, *, steps, below, differs, gap, limit):
    """Token to mask with an even schedule of one block: (tokens after each step, how often each was hidden again)."""
    x, sure, hidden = [MASK] * LENGTH, [None] * LENGTH, [0] * LENGTH
    states = []
    for step in range(steps):
        masks = [i for i in range(LENGTH) if x[i] == MASK]
        if not masks:
            break
        said, doubted = probabilities(say(x)), []
        for i in range(LENGTH):
            if x[i] == MASK or hidden[i] == limit or step + 1 == steps:
                continue
            own, new = said[i][x[i]], best(said[i])
            low = below is not None and own < below
            other = differs is not None and new != x[i] and said[i][new] > differs
            fallen = gap is not None and sure[i] - own > gap
            if low or other or fallen:
                doubted.append(i)
        order = sorted(masks, key=lambda i: -said[i][best(said[i])])
        for i in order[: -(-len(masks) // (steps - step))]:
            x[i] = best(said[i])
            sure[i] = said[i][x[i]]
        for i in doubted:
            x[i], sure[i] = MASK, None
            hidden[i] += 1
        states.append(list(x))
    return states, hidden


@pytest.mark.parametrize(
    ("below", "differs", "gap"),
    [(0.1, 0.9, 0.3), (0.3, None, None), (None, 0.4, None), (None, None, 0.1), (0.5, 0.2, 0.05)],
)
@pytest.mark.parametrize("limit", [1, 3])
def test_suspicious_tokens_are_hidden_again_as_written_out(below, differs, gap, limit):
    backbone = table()
    settings = {"below": below, "differs": differs, "gap": gap, "limit": limit}
    sampled = sample(Sampler(length=LENGTH, steps=8, reviser=TokenToMask(**settings)), backbone)
    assert not (sampled.ids == MASK).any()
    total = 0
    for row in range(ROWS):
        states, hidden = mask_by_hand(lambda x, row=row: backbone.say(row, x), steps=8, **settings)
        assert [step.tokens for step in sampled.traces[row]] == states
        assert int(sampled.remasks[row]) == sum(hidden)
        total += sum(hidden)
    assert total > 0


def test_given_tokens_have_no_confidence_to_fall_from():
    start = torch.full((ROWS, LENGTH), MASK)
    start[:, ::2] = 5
    sampler = Sampler(length=LENGTH, steps=6, reviser=TokenToMask(below=None, differs=None, gap=0.0))
    sampled = sample(sampler, start=start)
    assert sampled.remasks.sum() > 0
    assert (sampled.ids[:, ::2] == 5).all()


@pytest.mark.parametrize(
    ("sampler", "rows"),
    [
        (Sampler(length=LENGTH, blocks=2, unmask=Threshold(0.5, scheduled=False), post_steps=4,
                 reviser=ThresholdEdit(tau=0.1, block_passes=4)), [2, 0]),
        (Sampler(length=LENGTH, steps=6, reviser=TokenToMask(below=0.4)), [3, 1]),
    ],
)  # fmt: skip
def test_a_row_does_not_depend_on_the_others(sampler, rows):
    together = sample(sampler)
    apart = sample(sampler, rows=rows)
    for place, row in enumerate(rows):
        assert torch.equal(apart.ids[place], together.ids[row])
        assert apart.forwards[place] == together.forwards[row]


def test_wrong_settings():
    for wrong in ({"tau": 1.5}, {"tau": 0.5, "block_passes": -1}):
        with pytest.raises(ValueError, match=str(list(wrong.values())[-1])):
            ThresholdEdit(**wrong)
    for wrong in ({"below": 1.5}, {"differs": -0.5}, {"gap": 2.0}, {"limit": 0}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            TokenToMask(**wrong)
    with pytest.raises(ValueError, match="nothing is ever remasked"):
        TokenToMask(below=None, differs=None, gap=None)
