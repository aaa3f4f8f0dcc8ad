"""The sampler with a small random model: against plain loops over lists, and rows in a batch against rows alone."""

from __future__ import annotations

import math

import pytest
import torch

from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.types import SpecialIds
from tests.backbones import small_model

MASK, EOS, EOT, BOS = 0, 1, 2, 3
V = 24
SPECIAL = SpecialIds(mask=MASK, eos=EOS, eot=EOT, banned=(MASK, BOS), vocab_size=V)
PROMPTS = [[4, 9, 7], [5, 6, 21, 8, 11, 13], [12, 4], [17, 18, 19, 20]]
KEYS = list("abcd")
SUFFIX = (9, 14, EOT)


def tiny(attention="prefix", seed=11):
    return small_model(V, attention=attention, sharpness=8.0, seed=seed)


def ending(seed):
    """A small model that often writes eot."""
    model = tiny(seed=seed)
    with torch.no_grad():
        model.lm_head.weight[EOT] *= 1.5
    return model


def encode(model, prompts):
    """Prefix of prompts of any lengths, padded on the right."""
    longest = max(map(len, prompts))
    ids = torch.tensor([p + [EOS] * (longest - len(p)) for p in prompts])
    mask = torch.tensor([[i < len(p) for i in range(longest)] for p in prompts])
    with torch.no_grad():
        return model.encode_prefix({"prompt_ids": ids, "prompt_mask": mask})


class ByHand:
    """LLaDA's and ReDiff's loops for one row. Texts are lists; `stop` is where the text ended early."""

    def __init__(
        self, model, prompt, *, length, start=None, cfg_scale=0.0, suffix=(), early_stop=False, eos_behind_eot=False
    ):
        self.model, self.suffix, self.scale = model, list(suffix), cfg_scale
        self.prefix, self.blank = encode(model, [prompt]), encode(model, [[MASK] * len(prompt)])
        self.x, self.early, self.stop = list(start or [MASK] * length), early_stop, length
        self.whole_texts = eos_behind_eot
        self.forwards = self.edits = self.steps = 0

    def say(self, prefix):
        self.forwards += 1
        with torch.no_grad():
            return self.model(prefix, torch.tensor([self.x + self.suffix]))[0, : len(self.x)].double()

    def predict(self):
        logits = self.say(self.prefix)
        if self.scale:
            hidden = self.say(self.blank)
            logits = hidden + (self.scale + 1) * (logits - hidden)
        logits[:, [MASK, BOS]] = -math.inf
        return logits.argmax(-1).tolist(), logits.softmax(-1).max(-1).values.tolist()

    def hidden(self, places):
        return [i for i in places if self.x[i] == MASK]

    def step(self, places, count, rewriting, share=1.0):
        """Unmask `count` masks of `places`, or before the stop once there is one; rewrite `share` of `rewriting`."""
        best, sure = self.predict()
        chosen = self.hidden(range(self.stop) if self.stop < len(self.x) else places)
        unmasked = sorted(chosen, key=lambda i: -sure[i])[:count]
        last_word = max((i for i, token in enumerate(self.x) if token not in (MASK, EOT, EOS)), default=-1)
        if self.early is True and all(best[i] in (EOT, EOS) and i > last_word for i in chosen):
            unmasked = chosen
        rewritten = sorted(rewriting, key=lambda i: -sure[i])[: int(len(rewriting) * share)]
        if self.whole_texts:
            eot = self.x.index(EOT) if EOT in self.x else len(self.x)
            rewritten = [i for i in rewritten if best[i] != EOS or i > eot]
        self.edits += sum(self.x[i] != best[i] for i in rewritten)
        for i in unmasked + rewritten:
            self.x[i] = best[i]
        if self.early == "eot" and EOT in self.x:
            self.stop = min(self.stop, self.x.index(EOT))
        if (
            self.early is True
            and places
            and not self.hidden(range(places[-1] + 1))
            and self.x[places[-1]] in (EOT, EOS)
        ):
            self.stop = min(self.stop, places[-1] + 1)
        self.steps += 1

    def block(self, places, *, steps=None, tokens_per_step=None, revise=False, share=1.0, begin=1.0):
        masks = len(self.hidden(places))
        steps = steps or -(-masks // tokens_per_step)
        for step in range(steps):
            if not self.hidden(places) or not self.hidden(range(self.stop)):
                return
            count = masks // steps + (step < masks % steps)
            begun = revise and step >= steps - math.ceil(steps * begin)
            self.step(places, count, [i for i in places if self.x[i] != MASK] if begun else [], share)

    def post(self, steps, share=1.0):
        states = [self.x.copy()]
        for _ in range(steps):
            self.step([], 0, [i for i, token in enumerate(self.x) if token != MASK], share)
            if self.x in states:
                return
            states.append(self.x.copy())

    @property
    def text(self):
        length = len(self.x)
        end = min(self.stop, self.x.index(EOT) if EOT in self.x else length)
        ending = [] if self.early is True and end == self.stop else [EOT]  # `True` leaves the end as it was written
        return [*self.x[:end], *ending, *[EOS] * length][:length]


def by_hand(model, prompt, *, length, blocks, post=0, speed, revising=None, **settings):
    row, size = ByHand(model, prompt, length=length, **settings), length // blocks
    if "steps" in speed:
        speed = {"steps": speed["steps"] // blocks}
    for start in range(0, length, size):
        row.block(range(start, start + size), **speed, revise=revising is not None, **(revising or {}))
    row.post(post, (revising or {}).get("share", 1.0))
    return row


SPEEDS = [
    {"length": 12, "blocks": 1, "tokens_per_step": 1},
    {"length": 12, "blocks": 1, "tokens_per_step": 5},
    {"length": 13, "blocks": 1, "steps": 4},
    {"length": 12, "blocks": 3, "steps": 6},
    {"length": 14, "blocks": 2, "tokens_per_step": 3},
]


def compare(model, case, *, reviser=None, revising=None, post=0, start=None, suffix=(), **settings):
    """Run both sides over all prompts; returns the rows of the plain loops."""
    sampler = Sampler(**case, **settings, reviser=reviser, post_steps=post)
    speed = {name: case[name] for name in ("steps", "tokens_per_step") if name in case}
    given = {"length": case["length"], "blocks": case["blocks"], "suffix": suffix, "post": post, **settings}
    given |= {"speed": speed, "revising": revising}
    starts = [None] * len(PROMPTS) if start is None else start.tolist()
    rows = [by_hand(model, p, start=s, **given) for p, s in zip(PROMPTS, starts, strict=True)]
    options = {"special": SPECIAL, "keys": KEYS, "seed": 0, "start": start, "trace": True}
    behind = torch.tensor(suffix) if suffix else None
    sampled = sampler(model, encode(model, PROMPTS), suffix=behind, **options)
    assert sampled.ids.tolist() == [row.text for row in rows]
    assert sampled.forwards.tolist() == [row.forwards for row in rows]
    assert sampled.edits.tolist() == [row.edits for row in rows]
    assert [len(trace) for trace in sampled.traces] == [row.steps for row in rows]
    return rows


@pytest.mark.parametrize("case", SPEEDS)
@pytest.mark.parametrize("attention", ["full", "prefix"])
def test_without_reviser_it_is_llada(case, attention):
    rows = compare(tiny(attention), case)
    assert [row.edits for row in rows] == [0] * 4


@pytest.mark.parametrize("case", SPEEDS)
@pytest.mark.parametrize("post", [0, 2])
def test_overwrite_all_is_rediff(case, post):
    rows = compare(tiny(), case, reviser=OverwriteAll(), revising={}, post=post)
    assert sum(row.edits for row in rows) > 0  # else the case would show nothing


@pytest.mark.parametrize(("share", "begin"), [(0.5, 1.0), (1.0, 0.2), (0.34, 0.5), (1.0, 0.0)])
def test_a_share_of_the_tokens_is_rewritten_in_the_last_steps(share, begin):
    model, revising = tiny(), {"share": share, "begin": begin}
    some, everything = [], []
    for case in SPEEDS:
        some += compare(model, case, reviser=OverwriteAll(**revising), revising=revising, post=1)
        everything += compare(model, case, reviser=OverwriteAll(), revising={}, post=1)
    assert 0 < sum(row.edits for row in some) < sum(row.edits for row in everything)


@pytest.mark.parametrize("case", [SPEEDS[1], SPEEDS[3]])
@pytest.mark.parametrize("attention", ["full", "prefix"])
@pytest.mark.parametrize("more", [{"cfg_scale": 1.5}, {"suffix": SUFFIX}])
def test_guidance_and_a_suffix_change_the_text(case, attention, more):
    model, settings = tiny(attention), {"reviser": OverwriteAll(), "revising": {}, "post": 1}
    rows, without = compare(model, case, **settings, **more), compare(model, case, **settings)
    assert all(row.forwards == row.steps * (2 if "cfg_scale" in more else 1) for row in rows)
    assert [row.text for row in rows] != [row.text for row in without]


@pytest.mark.parametrize(("limit", "spent"), [(2, 2), (3, 2), (5, 4), (6, 6), (9, 6)])
def test_a_budget_counts_both_calls_of_a_guided_step(limit, spent):
    model, sampler = tiny(), Sampler(length=6, tokens_per_step=2, cfg_scale=1.0, max_forwards=limit)
    sampled = sampler(model, encode(model, PROMPTS), special=SPECIAL, keys=KEYS, seed=0)
    assert sampled.forwards.tolist() == [spent] * 4
    assert MASK not in sampled.ids


@pytest.mark.parametrize("case", SPEEDS[1:4])
@pytest.mark.parametrize("revising", [None, {}, {"share": 0.5, "begin": 0.5}])
def test_an_early_stop_spares_what_is_behind_it(case, revising):
    reviser = None if revising is None else OverwriteAll(**revising)
    settings = {"early_stop": "eot", "reviser": reviser, "revising": revising, "post": 2 * (reviser is not None)}
    rows = [row for seed in (1, 2) for row in compare(ending(seed), case, **settings)]
    stopped = [row for row in rows if row.stop < case["length"]]
    assert stopped
    assert any(MASK in row.x[row.stop :] for row in stopped)
    assert not any(EOT in row.text[: row.stop] or MASK in row.text for row in rows)


def test_a_given_beginning_is_continued():
    start = torch.full((4, 14), MASK)
    start[:, :5] = torch.tensor([8, 4, 19, 7, 6])
    start[3, 9] = 12
    case = {"length": 14, "blocks": 2, "tokens_per_step": 3}
    rows = compare(tiny(), case, start=start, reviser=OverwriteAll(), revising={}, suffix=SUFFIX, cfg_scale=0.5)
    assert sum(row.edits for row in rows) > 0


@pytest.mark.parametrize("case", [SPEEDS[1], SPEEDS[3]])
@pytest.mark.parametrize(("revising", "eos_behind_eot"), [(None, False), ({}, False), ({}, True)])
def test_a_row_is_done_when_only_its_end_is_left(case, revising, eos_behind_eot):
    """Fewer calls than with all steps; end-of-text inside a text only where that is allowed."""
    reviser = None if revising is None else OverwriteAll()
    settings = {"reviser": reviser, "revising": revising, "eos_behind_eot": eos_behind_eot}
    stopped = [row for seed in (1, 2, 3) for row in compare(ending(seed), case, early_stop=True, **settings)]
    whole = [row for seed in (1, 2, 3) for row in compare(ending(seed), case, **settings)]
    assert sum(row.forwards for row in stopped) < sum(row.forwards for row in whole)


OPTIONS = [({}, None), ({"early_stop": True}, None), ({"early_stop": "eot", "cfg_scale": 0.5}, SUFFIX)]


@pytest.mark.parametrize("attention", ["full", "prefix"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("options", "suffix"), OPTIONS)
def test_a_batch_equals_its_rows_one_by_one(attention, temperature, options, suffix):
    model = tiny(attention)
    reviser = OverwriteAll(share=0.7, begin=0.8)
    sampler = Sampler(length=12, tokens_per_step=3, reviser=reviser, post_steps=6, temperature=temperature, **options)
    start = torch.full((4, 12), MASK)
    start[1, 2:] = 9  # so that rows end at different steps
    start[3, :7] = 5
    behind = None if suffix is None else torch.tensor(suffix)
    options = {"special": SPECIAL, "seed": 3, "suffix": behind}
    batch = sampler(model, encode(model, PROMPTS), keys=KEYS, start=start, **options)
    for row in range(4):
        prefix = encode(model, [PROMPTS[row]])
        alone = sampler(model, prefix, keys=[KEYS[row]], start=start[row : row + 1], **options)
        assert batch.ids[row].tolist() == alone.ids[0].tolist()
        assert int(batch.forwards[row]) == int(alone.forwards[0])
        assert int(batch.edits[row]) == int(alone.edits[0])
