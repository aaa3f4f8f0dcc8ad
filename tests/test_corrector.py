"""ProSeCo's corrector against loops written out, on a fixed table, and in its limits.

The released block sampler's own steps and calls are in tests/test_golden_sampler.py.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from src.diffusion.noise import Noise
from src.samplers.proseco import Corrector
from src.samplers.sampler import Sampler
from src.samplers.unmask import Bernoulli, Threshold
from src.types import SpecialIds
from tests.backbones import Table, rows_of

MASK, EOS, EOT, BAD, V, LENGTH = 0, 1, 2, 3, 24, 12
SPECIAL = SpecialIds(mask=MASK, eos=EOS, eot=V, banned=(BAD,), vocab_size=V)
KEYS = ["a", "b", "c"]


def table():
    """Some rows hardly listen to their text and soon agree with themselves. Ids that may not be written are likely."""
    listens = (1.0, 0.1, 2.0, 0.7)
    return Table(vocab_size=V, length=LENGTH, seed=5, sharp=(1.0,) * 4, listens=listens, likely=[MASK, BAD], bonus=8.0)


def sample(backbone, sampler, rows=range(3), seed=0, **settings):
    keys = [KEYS[row] for row in rows]
    return sampler(backbone, rows_of(rows), special=SPECIAL, keys=keys, seed=seed, trace=True, **settings)


def softmax(row):
    top = max(row)
    parts = [math.exp(value - top) for value in row]
    return [part / sum(parts) for part in parts]


def best(row):
    """The argmax that may be written."""
    return max((v for v in range(V) if v not in (MASK, BAD)), key=lambda v: row[v])


def at(places):
    where = torch.zeros(1, LENGTH, dtype=torch.bool)
    where[0, list(places)] = True
    return where


def drawn(rows, noise, places):
    """A token for each row of logits, which are those of `places`, by the Gumbel rule."""
    gumbel = torch.cat([torch.zeros(0, V), *noise.gumbel(at(places), V)]).tolist()
    noisy = [[a + b for a, b in zip(row, add, strict=True)] for row, add in zip(rows, gumbel, strict=True)]
    return [best(row) for row in noisy]


def by_hand(  # noqa: C901  one loop, to be read next to the papers' pseudocode
    say, key, *, steps, blocks=1, every=1, passes=1, pick="argmax", num_edits=None, counts="block", begin=1,
    whole=False, temperature=0.0, scale=0.0,
):  # fmt: skip
    """One row, as lists: (tokens after each step, forward calls). `whole` unmasks by chance, as for MDLM."""
    streams = {name: Noise([key], seed=0, draw=name) for name in ("sampler", "unmask", "reviser")}
    x, states, calls, total = [MASK] * LENGTH, [], 0, 0
    known = (None, None)  # a text and its logits

    def logits_of(tokens):
        nonlocal calls
        calls += 2 if scale else 1
        told = [[float(value) for value in row] for row in say(tokens)]
        return [[-math.inf if v == BAD else value for v, value in enumerate(row)] for row in told]

    for block in range(blocks):
        end = (block + 1) * LENGTH // blocks
        for step in range(1, steps // blocks + 1):
            if MASK not in x[:end]:
                break
            total += 1
            number = step if counts == "block" else total
            fires = bool(passes) and number % every == 0 and number >= begin
            known = known if known[0] == x else (x, logits_of(x))
            logits = list(known[1])
            if fires:
                draft = [best(row) if t == MASK else t for t, row in zip(x, logits, strict=True)]
                said, second = x, logits
                for _ in range(passes):
                    if draft != said:
                        said, second = list(draft), logits_of(draft)
                    elif pick != "sample":
                        break
                    if pick == "argmax":
                        draft[:end] = [best(row) for row in second[:end]]
                    elif pick == "sample":
                        draft[:end] = drawn(second[:end], streams["reviser"], range(end))
                    else:
                        other = [i for i in range(end) if best(second[i]) != draft[i]]
                        surest = sorted(other, key=lambda i: -softmax(second[i])[best(second[i])])
                        for i in surest[:num_edits]:
                            draft[i] = best(second[i])
                logits[:end] = second[:end]
                x = [draft[i] if t != MASK and i < end else t for i, t in enumerate(x)]
            hidden = [i for i in range(end) if x[i] == MASK]
            told = [logits[i] for i in hidden]
            tokens = drawn(told, streams["sampler"], hidden) if temperature else [best(row) for row in told]
            if whole:
                chance = streams["unmask"].uniform(at(hidden))[at(hidden)].tolist()
                unmasked = [n for n, u in enumerate(chance) if step == steps or u < 1 / (steps + 1 - step)]
            else:
                order = sorted(range(len(hidden)), key=lambda n: -softmax(told[n])[tokens[n]])
                unmasked = order[: -(-len(hidden) // (steps // blocks + 1 - step))]
            x = list(x)
            for n in unmasked:
                x[hidden[n]] = tokens[n]
            states.append(list(x))
    return states, calls


def check(settings, *, whole=False, scale=0.0, backbone=None, **more):
    """Our sampler does what the loop does, with as many calls. Returns (its result, most calls allowed)."""
    backbone, steps, blocks = backbone or table(), more.get("steps", 6), more.get("blocks", 1)
    began = backbone.rows
    sampler = Sampler(
        length=LENGTH, steps=steps, blocks=blocks, reviser=Corrector(**settings), cfg_scale=scale,
        unmask=Bernoulli() if whole else None, temperature=more.get("temperature", 0.0),
    )  # fmt: skip
    sampled = sample(backbone, sampler)
    asked = backbone.rows - began
    assert asked == int(sampled.forwards.sum())  # every call is counted, and none twice
    for row, key in enumerate(KEYS):

        def say(tokens, row=row):
            told = backbone.say(row, tokens)
            blind = backbone.say(-1, tokens)
            return blind + (scale + 1) * (told - blind) if scale else told

        states, calls = by_hand(say, key, whole=whole, scale=scale, **{"steps": steps, **settings, **more})
        assert [step.tokens for step in sampled.traces[row]] == states
        assert int(sampled.forwards[row]) == calls
    written = {token for row in sampled.traces for token in row[-1].tokens}
    assert not written & {MASK, BAD}
    every, passes = settings.get("every", 1), settings.get("passes", 1)
    most = (steps + steps // every * passes) * (2 if scale else 1)
    assert int(sampled.forwards.max()) <= most
    return sampled, most


PICKS = [{"pick": "sample"}, {"pick": "edit", "num_edits": 1}, {"pick": "edit", "num_edits": 3}]


@pytest.mark.parametrize(
    ("blocks", "settings"),
    [
        (1, {"every": 1, "passes": 1}), (1, {"every": 2, "passes": 5}), (2, {"every": 1, "passes": 3}),
        (2, {"every": 3, "passes": 2}), (3, {"every": 2, "passes": 4}),
        (3, {"every": 4, "passes": 2, "counts": "text"}), (1, {"every": 2, "passes": 2, "begin": 3}),
        *((blocks, {"every": 2, "passes": 4, **picked}) for blocks in (1, 3) for picked in PICKS),
    ],
)  # fmt: skip
def test_in_blocks_it_is_the_loop_written_out(blocks, settings):
    sampled, _ = check(settings, blocks=blocks)
    assert sampled.edits.sum() > 0


@pytest.mark.parametrize("picked", [{}, {"pick": "sample"}, {"pick": "edit", "num_edits": 2}])
@pytest.mark.parametrize(("every", "passes", "begin"), [(2, 3, 1), (3, 2, 6)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_on_whole_texts_it_is_the_loop_written_out(picked, every, passes, begin, temperature):
    settings = {"every": every, "passes": passes, "begin": begin, "counts": "text", **picked}
    sampled, _ = check(settings, whole=True, steps=LENGTH, temperature=temperature)
    assert sampled.edits.sum() > 0


@pytest.mark.parametrize("picked", [{}, {"pick": "edit", "num_edits": 2}])
def test_guidance_holds_for_corrections_at_twice_the_calls(picked):
    """In the released code the scale has no effect where every step corrects."""
    ids = {scale: check({"passes": 2, **picked}, scale=scale)[0].ids.tolist() for scale in (0.0, 0.5, 3.0)}
    assert ids[0.0] != ids[0.5] != ids[3.0]


def test_a_draft_that_is_drawn_again_may_change_later():
    """One place is undecided, so that half of the draws give the draft that was read before."""
    backbone = table()
    backbone.left, backbone.right = torch.zeros(V, V), torch.zeros(V, V)
    backbone.own[:, :, 7], backbone.own[:, 0, 9] = 60.0, 60.0
    sampled, most = check({"passes": 12, "pick": "sample"}, steps=2, backbone=backbone)
    assert all(2 + 2 < calls < most for calls in sampled.forwards.tolist())


def test_post_steps_start_from_the_logits_of_the_text():
    """A text without masks is its own draft: its first pass is the call that the step has made."""
    backbone = table()
    given = sample(backbone, Sampler(length=LENGTH, steps=6)).ids
    for row in range(3):
        draft, calls = given[row].tolist(), 0
        for _ in range(3):
            calls += 1
            better = [best(line) for line in backbone.say(row, draft).tolist()]
            if better == draft:
                break
            draft = better
        sampler = Sampler(length=LENGTH, steps=6, reviser=Corrector(passes=3), post_steps=1)
        sampled = sample(backbone, sampler, [row], start=given[row : row + 1])
        assert (sampled.ids[0].tolist(), int(sampled.forwards[0])) == (draft, calls)


@pytest.mark.parametrize("picked", [{}, {"pick": "sample"}, {"pick": "edit", "num_edits": 2}])
@pytest.mark.parametrize("unmask", [None, Bernoulli()])
def test_a_row_does_not_depend_on_the_others(picked, unmask):
    reviser = Corrector(passes=6, **picked)
    sampler = Sampler(length=LENGTH, steps=6, unmask=unmask, reviser=reviser, post_steps=2)
    together = sample(table(), sampler)
    for row in range(len(KEYS)):
        alone = sample(table(), sampler, [row])
        assert torch.equal(alone.ids[0], together.ids[row])
        assert alone.forwards[0] == together.forwards[row]
    again = sample(table(), sampler)
    assert torch.equal(again.ids, together.ids)


def test_without_a_schedule_steps_are_counted_as_they_come():
    """Two steps are scheduled, twelve are made, and every third one corrects."""
    backbone = table()
    unmask = Threshold(1.0, scheduled=False)
    sampler = Sampler(length=LENGTH, steps=4, unmask=unmask, reviser=Corrector(every=3, passes=1))
    sampled = sample(backbone, sampler)
    assert [len(step.unmasked) for step in sampled.traces[0]] == [1] * LENGTH
    calls = [0, *(step.forwards for step in sampled.traces[0])]
    assert [b - a for a, b in pairwise(calls)] == [1, 1, 2] * 4


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("budget", [4, 7, 10, 15])
def test_corrections_keep_to_the_budget(budget, scale):
    settings = {"length": LENGTH, "steps": 6, "reviser": Corrector(passes=4), "cfg_scale": scale}
    sampled = sample(table(), Sampler(**settings, max_forwards=budget))
    assert budget - 1 <= int(sampled.forwards.max()) <= budget
    assert not (sampled.ids == MASK).any()
    assert torch.equal(
        sample(table(), Sampler(**settings, max_forwards=100)).ids, sample(table(), Sampler(**settings)).ids
    )


@pytest.mark.parametrize(
    ("settings", "schedule", "words"),
    [
        ({"every": 4}, {"blocks": 2}, "every=4 begin=1 never corrects where a block has 3 steps.* counts=text"),
        ({"every": 7}, {}, "every=7 begin=1 never corrects where a block has 6 steps: lower these"),
        ({"every": 7, "counts": "text"}, {"blocks": 2}, "where a text has 6 steps"),
        ({"every": 2, "begin": 3}, {"blocks": 2}, "every=2 begin=3 never"),
    ],
)
def test_a_corrector_that_never_corrects_is_refused(settings, schedule, words):
    with pytest.raises(ValueError, match=words):
        Sampler(length=LENGTH, steps=6, reviser=Corrector(**settings), **schedule)
    Sampler(length=LENGTH, steps=6, reviser=Corrector(**{**settings, "passes": 0}), **schedule)


@pytest.mark.parametrize(
    "wrong",
    [
        {"every": 0}, {"passes": -1}, {"begin": 0}, {"num_edits": 2}, {"num_edits": 0, "pick": "edit"},
    ],
)  # fmt: skip
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Corrector(**wrong)
    with pytest.raises(ValueError, match="got None"):
        Corrector(pick="edit")
