"""ProSeCo's corrector against loops written out, on a small random model and on a fixed table, and in its limits.

The released block sampler's own steps and calls are in tests/test_golden_sampler.py.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from src.diffusion.noise import Noise
from src.models.llada_v import LLaDAV
from src.samplers.proseco import Corrector
from src.samplers.sampler import Sampler
from src.samplers.unmask import Bernoulli, Threshold
from src.types import Prefix, SpecialIds

MASK, EOS, EOT, BAD, V, LENGTH = 0, 1, 2, 3, 24, 12
SPECIAL = SpecialIds(mask=MASK, eos=EOS, eot=V, banned=(BAD,), vocab_size=V)
PROMPTS = torch.tensor([[4, 9, 7], [5, 6, 21], [12, 4, 3]])
KEYS = ["a", "b", "c"]


class Table:
    """A backbone by arithmetic: logits are sums of what the neighbours, the place and the row say.

    Some rows hardly listen to their text and soon agree with themselves. The mask and a banned id are the likeliest of
    all. An unguided row is the negative one. Counts the rows it is asked for.
    """

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(5)
        self.left, self.right = (torch.randn(V, V, generator=made) for _ in range(2))
        self.own = torch.randn(len(KEYS) + 1, LENGTH, V, generator=made)
        self.own[:, :, [MASK, BAD]] += 8.0
        self.rows = 0

    def encode_prefix(self, inputs):
        return Prefix(-torch.ones(*inputs["prompt_ids"].shape, 1))

    def say(self, row, tokens):
        """(L, V) logits of one row."""
        self.rows += 1
        text, neighbours = torch.tensor(tokens), (1.0, 0.1, 2.0, 0.7)[row]
        heard = self.left[text.roll(1)] + self.right[text.roll(-1)] + 0.5 * self.left[text]
        return self.own[row] + neighbours * heard

    def __call__(self, prefix, tokens, *, attend=None, positions=None):
        rows = prefix.embeds[:, 0, 0].int().tolist()
        return torch.stack([self.say(row, told) for row, told in zip(rows, tokens.tolist(), strict=True)])[positions]


def sample(backbone, sampler, rows=range(3), seed=0):
    prefix = Prefix(torch.tensor(list(rows), dtype=torch.float32)[:, None, None])
    keys = [KEYS[row] for row in rows]
    return sampler(backbone, prefix, special=SPECIAL, keys=keys, seed=seed, trace=True)


def softmax(row):
    top = max(row)
    parts = [math.exp(value - top) for value in row]
    return [part / sum(parts) for part in parts]


def best(row):
    """The argmax that may be written."""
    return max((v for v in range(V) if v not in (MASK, BAD)), key=lambda v: row[v])


def drawn(rows, generator):
    """A token for each row of logits, by the Gumbel rule."""
    chance = torch.rand(len(rows), V, generator=generator, dtype=torch.float64).tolist()
    gumbel = [[-math.log(-math.log(u)) for u in row] for row in chance]
    noisy = [[a + b for a, b in zip(row, add, strict=True)] for row, add in zip(rows, gumbel, strict=True)]
    return [best(row) for row in noisy]


def by_hand(  # noqa: C901  one loop, to be read next to the papers' pseudocode
    say, key, *, steps, blocks=1, every=1, passes=1, pick="argmax", num_edits=None, counts="block", begin=1,
    whole=False, temperature=0.0, scale=0.0,
):  # fmt: skip
    """One row, as lists: (tokens after each step, forward calls). `whole` unmasks by chance, as for MDLM."""
    streams = {name: Noise([key], seed=0, draw=name).generators[0] for name in ("sampler", "unmask", "reviser")}
    x, states, calls, total = [MASK] * LENGTH, [], 0, 0
    known = (None, None, set())  # a text, its logits, and the places where these were asked for

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
            needed = set(range(LENGTH)) if fires else {i for i in range(end) if x[i] == MASK}
            known = (x, known[1] if known[0] == x and needed <= known[2] else logits_of(x), needed)
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
                        draft[:end] = drawn(second[:end], streams["reviser"])
                    else:
                        other = [i for i in range(end) if best(second[i]) != draft[i]]
                        surest = sorted(other, key=lambda i: -softmax(second[i])[best(second[i])])
                        for i in surest[:num_edits]:
                            draft[i] = best(second[i])
                logits[:end] = second[:end]
                x = [draft[i] if t != MASK and i < end else t for i, t in enumerate(x)]
            hidden = [i for i in range(end) if x[i] == MASK]
            told = [logits[i] for i in hidden]
            tokens = drawn(told, streams["sampler"]) if temperature else [best(row) for row in told]
            if whole:
                chance = torch.rand(len(hidden), generator=streams["unmask"], dtype=torch.float32).tolist()
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
    backbone, steps, blocks = backbone or Table(), more.get("steps", 6), more.get("blocks", 1)
    began = backbone.rows
    sampler = Sampler(
        length=LENGTH, steps=steps, blocks=blocks, reviser=Corrector(**settings), cfg_scale=scale,
        unmask=Bernoulli() if whole else None, temperature=more.get("temperature", 0.0),
    )  # fmt: skip
    found = sample(backbone, sampler)
    asked = backbone.rows - began
    assert asked == int(found.forwards.sum())  # every call is counted, and none twice
    for row, key in enumerate(KEYS):

        def say(tokens, row=row):
            told = backbone.say(row, tokens)
            blind = backbone.say(-1, tokens)
            return blind + (scale + 1) * (told - blind) if scale else told

        states, calls = by_hand(say, key, whole=whole, scale=scale, **{"steps": steps, **settings, **more})
        assert [step.tokens for step in found.traces[row]] == states
        assert int(found.forwards[row]) == calls
    written = {token for row in found.traces for token in row[-1].tokens}
    assert not written & {MASK, BAD}
    every, passes = settings.get("every", 1), settings.get("passes", 1)
    most = (steps + steps // every * passes) * (2 if scale else 1)
    assert int(found.forwards.max()) <= most
    return found, most


@pytest.mark.parametrize(("blocks", "every", "passes"), [(1, 1, 1), (1, 2, 5), (2, 1, 3), (2, 3, 2), (3, 2, 4)])
def test_in_blocks_it_is_the_loop_written_out(blocks, every, passes):
    found, _ = check({"every": every, "passes": passes}, blocks=blocks)
    assert found.edits.sum() > 0


@pytest.mark.parametrize(
    "picked", [{"pick": "sample"}, {"pick": "edit", "num_edits": 1}, {"pick": "edit", "num_edits": 3}]
)
@pytest.mark.parametrize("blocks", [1, 3])
def test_each_pick_is_the_loop_written_out(picked, blocks):
    found, _ = check({"every": 2, "passes": 4, **picked}, blocks=blocks)
    assert found.edits.sum() > 0


@pytest.mark.parametrize("picked", [{}, {"pick": "sample"}, {"pick": "edit", "num_edits": 2}])
@pytest.mark.parametrize(("every", "passes", "begin"), [(1, 2, 1), (2, 3, 1), (3, 2, 6)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_on_whole_texts_it_is_the_loop_written_out(picked, every, passes, begin, temperature):
    settings = {"every": every, "passes": passes, "begin": begin, "counts": "text", **picked}
    found, _ = check(settings, whole=True, steps=LENGTH, temperature=temperature)
    assert found.edits.sum() > 0


def test_steps_may_be_counted_over_the_text():
    """Blocks of two steps, and every fourth step corrects: the second step of every other block."""
    found, _ = check({"every": 4, "passes": 2, "counts": "text"}, blocks=3)
    corrected = [[n for n, step in enumerate(row, 1) if step.rewritten] for row in found.traces]
    assert {n for row in corrected for n in row} == {4}


def test_the_first_steps_may_be_spared():
    found, _ = check({"every": 2, "passes": 2, "begin": 3})
    assert min(n for row in found.traces for n, step in enumerate(row, 1) if step.rewritten) == 4


@pytest.mark.parametrize("picked", [{}, {"pick": "edit", "num_edits": 2}])
def test_guidance_holds_for_corrections_at_twice_the_calls(picked):
    """In the released code the scale has no effect where every step corrects."""
    ids = {scale: check({"passes": 2, **picked}, scale=scale)[0].ids.tolist() for scale in (0.0, 0.5, 3.0)}
    assert ids[0.0] != ids[0.5] != ids[3.0]


def test_argmax_stops_where_it_agrees_and_sampling_does_not():
    stops, most = check({"passes": 8})
    assert int(stops.forwards.min()) < most
    sampled, most = check({"passes": 8, "pick": "sample"}, steps=2)
    assert sampled.forwards.tolist() == [most] * 3  # a draft that comes out the same would need no call


def test_a_sure_model_is_not_asked_for_what_it_has_said():
    """Each draw gives the same draft, so that its logits are known: one call for each first pass."""
    backbone = Table()
    backbone.left, backbone.right = torch.zeros(V, V), torch.zeros(V, V)
    backbone.own[:, :, 7] = 60.0
    for pick in ("argmax", "sample"):
        sampler = Sampler(length=LENGTH, steps=3, reviser=Corrector(passes=5, pick=pick))
        found = sample(backbone, sampler)
        assert found.ids.tolist() == [[7] * LENGTH] * 3
        assert found.forwards.tolist() == [6] * 3


def test_a_draft_that_is_drawn_again_may_change_later():
    """One place is undecided, so that half of the draws give the draft that was read before."""
    backbone = Table()
    backbone.left, backbone.right = torch.zeros(V, V), torch.zeros(V, V)
    backbone.own[:, :, 7], backbone.own[:, 0, 9] = 60.0, 60.0
    found, most = check({"passes": 12, "pick": "sample"}, steps=2, backbone=backbone)
    assert all(2 + 2 < calls < most for calls in found.forwards.tolist())


def test_post_steps_start_from_the_logits_of_the_text():
    """A text without masks is its own draft: its first pass is the call that the step has made."""
    backbone = Table()
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
        prefix = Prefix(torch.tensor([[[float(row)]]]))
        found = sampler(backbone, prefix, special=SPECIAL, keys=["a"], seed=0, start=given[row : row + 1])
        assert (found.ids[0].tolist(), int(found.forwards[0])) == (draft, calls)


@pytest.mark.parametrize("unmask", [None, Bernoulli()])
def test_without_passes_it_is_the_plain_sampler(unmask):
    settings = {"length": LENGTH, "steps": 6, "unmask": unmask, "temperature": 0.5}
    plain = sample(Table(), Sampler(**settings))
    for pick in ({}, {"pick": "sample"}):
        found = sample(Table(), Sampler(**settings, reviser=Corrector(passes=0, **pick)))
        assert torch.equal(found.ids, plain.ids)
        assert torch.equal(found.forwards, plain.forwards)


@pytest.mark.parametrize("picked", [{}, {"pick": "sample"}, {"pick": "edit", "num_edits": 2}])
@pytest.mark.parametrize("unmask", [None, Bernoulli()])
def test_a_row_does_not_depend_on_the_others(picked, unmask):
    reviser = Corrector(passes=6, **picked)
    sampler = Sampler(length=LENGTH, steps=6, unmask=unmask, reviser=reviser, post_steps=2)
    together = sample(Table(), sampler)
    for row in range(len(KEYS)):
        alone = sample(Table(), sampler, [row])
        assert torch.equal(alone.ids[0], together.ids[row])
        assert alone.forwards[0] == together.forwards[row]
    again = sample(Table(), sampler)
    assert torch.equal(again.ids, together.ids)


def test_the_scope_leaves_earlier_blocks_alone():
    changed = {}
    for scope in ("block", "written"):
        sampler = Sampler(length=LENGTH, steps=6, blocks=2, reviser=Corrector(passes=3, scope=scope))
        steps = [step for row in sample(Table(), sampler).traces for step in row[3:]]  # those of the second block
        changed[scope] = {place for step in steps for place, _, _ in step.rewritten}
    assert min(changed["block"], default=LENGTH) >= LENGTH // 2
    assert min(changed["written"]) < LENGTH // 2


def test_without_a_schedule_steps_are_counted_as_they_come():
    """Two steps are scheduled, twelve are made, and every third one corrects."""
    backbone = Table()
    unmask = Threshold(1.0, scheduled=False)
    sampler = Sampler(length=LENGTH, steps=4, unmask=unmask, reviser=Corrector(every=3, passes=1))
    found = sample(backbone, sampler)
    assert [len(step.unmasked) for step in found.traces[0]] == [1] * LENGTH
    calls = [0, *(step.forwards for step in found.traces[0])]
    assert [b - a for a, b in pairwise(calls)] == [1, 1, 2] * 4


def test_a_threshold_without_a_schedule_spends_its_budget_in_the_end():
    budget = Sampler(length=LENGTH, steps=2, unmask=Threshold(1.0, scheduled=False), max_forwards=3)
    assert [len(step.unmasked) for step in sample(Table(), budget).traces[0]] == [1, 1, LENGTH - 2]


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("budget", [4, 7, 10, 15])
def test_corrections_keep_to_the_budget(budget, scale):
    settings = {"length": LENGTH, "steps": 6, "reviser": Corrector(passes=4), "cfg_scale": scale}
    found = sample(Table(), Sampler(**settings, max_forwards=budget))
    assert budget - 1 <= int(found.forwards.max()) <= budget
    assert not (found.ids == MASK).any()
    assert torch.equal(
        sample(Table(), Sampler(**settings, max_forwards=100)).ids, sample(Table(), Sampler(**settings)).ids
    )


@torch.no_grad()
def test_it_corrects_with_a_network():
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LLaDAV(decoder={"vocab_size": V, **sizes}, vision=None).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(5)
    prefix = model.encode_prefix({"prompt_ids": PROMPTS})
    sampler = Sampler(length=LENGTH, steps=6, blocks=2, reviser=Corrector(every=3, passes=4))
    found = sampler(model, prefix, special=SPECIAL, keys=KEYS, seed=0, trace=True)
    for row, key in enumerate(KEYS):
        one = prefix.select(torch.tensor([row]))
        states, calls = by_hand(
            lambda tokens, one=one: model(one, torch.tensor([tokens]))[0], key, steps=6, blocks=2, every=3, passes=4
        )
        assert [step.tokens for step in found.traces[row]] == states
        assert int(found.forwards[row]) == calls
    assert found.edits.sum() > 0


@pytest.mark.parametrize(
    ("settings", "schedule", "words"),
    [
        ({"every": 4}, {"blocks": 2}, "every=4 begin=1 never corrects where a block has 3 steps.* counts=text"),
        ({"every": 7}, {}, "every=7 begin=1 never corrects where a block has 6 steps: lower these"),
        ({"every": 7, "counts": "text"}, {"blocks": 2}, "where the text has 6 steps"),
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
        {"every": 0}, {"passes": -1}, {"begin": 0}, {"scope": "all"}, {"pick": "best"}, {"counts": "all"},
        {"num_edits": 2}, {"num_edits": 0, "pick": "edit"},
    ],
)  # fmt: skip
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Corrector(**wrong)
    with pytest.raises(ValueError, match="got None"):
        Corrector(pick="edit")
