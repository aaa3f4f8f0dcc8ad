"""The sampler with scripted backbones, and outcomes computed by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.samplers.predictor import read
from src.samplers.rediff import OverwriteAll
from src.samplers.remdm import KeepSurest, RemaskLowest
from src.samplers.reviser import Reviser
from src.samplers.sampler import Sampler
from src.samplers.unmask import PART, Bernoulli, Factor, Threshold
from src.types import Prefix, SpecialIds
from tests.backbones import rows_of, small_model

MASK, EOS, EOT, BOS = 0, 1, 2, 3
V = 24
SPECIAL = SpecialIds(mask=MASK, eos=EOS, eot=EOT, banned=(MASK, BOS), vocab_size=V)
WORDS = range(4, V)


class Scripted:
    """A backbone whose logits are `script(row, call, tokens) -> (L, V)`; `row` is read from the prefix."""

    def __init__(self, script):
        self.script, self.calls, self.seen = script, 0, []

    def __call__(self, prefix, tokens, *, attend=None, positions=None):
        assert attend is None
        self.seen.append(tokens.clone())
        rows = prefix.embeds[:, 0, 0].int().tolist()
        logits = torch.stack([self.script(r, self.calls, t) for r, t in zip(rows, tokens, strict=True)])
        self.calls += 1
        return logits if positions is None else logits[positions]


def peaked(ids, heights=None):
    """(L, V) logits with the argmax `ids`; a higher height means more confidence."""
    logits = torch.zeros(len(ids), V)
    for place, token in enumerate(ids):
        logits[place, token] = 5.0 if heights is None else heights[place]
    return logits


def sample(sampler, backbone, count=1, **settings):
    settings = {"special": SPECIAL, "keys": [f"k{i}" for i in range(count)], "seed": 0} | settings
    return sampler(backbone, rows_of(range(count)), **settings)


NO_SCHEDULE = [
    *({"unmask": policy} for policy in (Bernoulli(), Threshold(0.9, scheduled=False), Factor(0.9, scheduled=False))),
    *({"reviser": reviser} for reviser in (KeepSurest(), RemaskLowest(number=1))),
]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokens_per_step": 2, "steps": 4}, "tokens_per_step=2 steps=4"),
        ({"blocks": 3}, "8 tokens cannot be split into 3"),
        ({"steps": 5, "blocks": 2}, "5 steps cannot be shared equally by 2"),
        ({"steps": 9}, "9 steps are more than the 8 tokens"),
        ({"tokens_per_step": 5, "blocks": 2}, "the block's 4, got 5"),
        ({"post_steps": 1}, "without a reviser, got 1"),
        ({"max_forwards": 0}, "at least 1, got 0"),
        *(
            ({name: bad}, f"{name} must be at least 0, got")
            for name in ("temperature", "cfg_scale")
            for bad in (math.nan, math.inf)
        ),
        *(
            ({"shift": 3, **options}, "shift=3 is for samplers that unmask a scheduled number")
            for options in NO_SCHEDULE
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Sampler(length=8, **settings)


# --- what a step does, by hand ---------------------------------------------------------------------------


def test_tokens_unmasked_in_a_step_are_rewritten_only_by_the_next():
    best = [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    heights = [[9, 8, 3, 2], [5, 5, 4, 6], [5, 5, 5, 5]]
    backbone = Scripted(lambda r, call, t: peaked(best[call], heights[call]))
    sampled = sample(Sampler(length=4, tokens_per_step=2, reviser=OverwriteAll(), post_steps=1), backbone, trace=True)
    # step 1 unmasks 0 and 1; step 2 rewrites these and unmasks 2 and 3; the post step rewrites all
    assert [step.tokens for step in sampled.traces[0]] == [[4, 5, MASK, MASK], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert [step.rewritten for step in sampled.traces[0]] == [
        [], [(0, 4, 8), (1, 5, 9)], [(0, 8, 12), (1, 9, 13), (2, 10, 14), (3, 11, 15)],
    ]  # fmt: skip
    assert (sampled.forwards.tolist(), sampled.edits.tolist(), sampled.remasks.tolist()) == ([3], [6], [0])
    without = sample(Sampler(length=4, tokens_per_step=2), Scripted(backbone.script))
    assert without.ids.tolist() == [[4, 5, 10, 11]]


@pytest.mark.parametrize(("scope", "expected"), [("block", [4, 4, 5, 5]), ("all", [5, 5, 5, 5])])
def test_scope_says_whether_earlier_blocks_are_revised(scope, expected):
    backbone = Scripted(lambda r, call, t: peaked([4 + call] * 4))
    sampled = sample(Sampler(length=4, tokens_per_step=2, blocks=2, reviser=OverwriteAll(scope=scope)), backbone)
    assert sampled.ids.tolist() == [expected]
    post = Sampler(length=4, tokens_per_step=2, blocks=2, reviser=OverwriteAll(scope=scope), post_steps=1)
    assert sample(post, Scripted(backbone.script)).ids.tolist() == [[6, 6, 6, 6]]  # every block, whatever the scope


def test_threshold_unmasks_what_is_sure_and_at_least_the_scheduled_number():
    def probability(p):  # the height that gives the peak probability p over the 22 ids that may be written
        return math.log(p / (1 - p) * 21)

    sure = [[0.9, 0.3, 0.95, 0.2, 0.1], [0.5, 0.4, 0.5, 0.3, 0.2], [0.5, 0.5, 0.5, 0.91, 0.92]]
    backbone = Scripted(lambda r, call, t: peaked([5] * 5, [probability(p) for p in sure[call]]))
    sampled = sample(Sampler(length=5, unmask=Threshold(0.85)), backbone, trace=True)
    assert [step.unmasked for step in sampled.traces[0]] == [[0, 2], [1], [3, 4]]
    assert sampled.traces[0][0].confidence == pytest.approx([0.9, 0.95])
    two = sample(Sampler(length=5, tokens_per_step=2, unmask=Threshold(0.99)), Scripted(backbone.script), trace=True)
    assert [len(step.unmasked) for step in two.traces[0]] == [2, 2, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("reviser", [None, OverwriteAll()])
def test_banned_ids_are_never_written(temperature, reviser):
    wide = V + 5  # the head has rows that the tokenizer lacks

    def script(row, call, tokens):
        logits = torch.zeros(9, wide)
        logits[:, [MASK, BOS, *range(V, wide)]] = 50.0
        return logits

    settings = {"temperature": temperature, "reviser": reviser, "post_steps": 2 if reviser else 0}
    sampled = sample(Sampler(length=9, tokens_per_step=2, **settings), Scripted(script), count=20)
    allowed = {*WORDS, EOS, EOT}
    assert {token for row in sampled.ids.tolist() for token in row} <= allowed


def test_a_confidence_is_a_share_of_the_ids_that_the_tokenizer_has():
    row = torch.full((V + 2,), -2.0)  # the head has two rows that the tokenizer lacks
    row[7], row[MASK], row[V], row[BOS] = 1.0, 3.0, 2.0, 9.0
    special = SpecialIds(mask=MASK, eos=EOS, eot=EOT, banned=(BOS,), vocab_size=V)
    for temperature in (0.0, 0.1):
        sampler = Sampler(length=2, tokens_per_step=2, temperature=temperature)
        sampled = sample(sampler, Scripted(lambda r, c, t: row.expand(2, -1)), special=special, trace=True)
        assert sampled.ids.tolist() == [[7, 7]]  # neither mask nor a row too many
        considered = row[:V].double()  # the mask as well
        considered[BOS] = -math.inf
        assert sampled.traces[0][0].confidence == pytest.approx([float(considered.softmax(0)[7])] * 2)


# --- a given start ---------------------------------------------------------------------------------------


def test_an_oracle_corrects_a_flawed_caption_in_one_forward_call():
    true = [[5, 6, 7, EOT, EOS, EOS], [8, 9, 10, 11, 12, EOT]]
    flawed = torch.tensor([[5, 16, 17, EOT, EOS, EOS], [8, 9, 10, EOT, EOS, EOS]])
    kept = flawed.clone()
    backbone = Scripted(lambda r, call, t: peaked(true[r]))
    sampler = Sampler(length=6, reviser=OverwriteAll(), post_steps=10)
    sampled = sample(sampler, backbone, count=2, start=flawed)
    assert sampled.ids.tolist() == true
    assert sampled.edits.tolist() == [2, 3]
    assert sampled.forwards.tolist() == [2, 2]  # the second one shows that nothing changes any more
    assert torch.equal(flawed, kept)
    shorter = Sampler(length=6, reviser=OverwriteAll(), post_steps=1)
    once = sample(shorter, Scripted(backbone.script), count=2, start=kept)
    assert (once.ids.tolist(), once.forwards.tolist()) == (true, [1, 1])


def test_rows_that_are_done_cost_nothing_more():
    true = [4, 5, 6, 7, 8, EOT]
    start = torch.tensor([[MASK] * 6, [4, MASK, 6, 7, 8, EOT], [4, 5, 6, 7, 8, EOT]])
    backbone = Scripted(lambda r, call, t: peaked(true))
    sampled = sample(Sampler(length=6, tokens_per_step=2), backbone, count=3, start=start)
    assert sampled.ids.tolist() == [true] * 3
    assert sampled.forwards.tolist() == [3, 1, 0]
    assert [len(tokens) for tokens in backbone.seen] == [2, 1, 1]


def test_a_start_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 5\).*\(1, 6\)"):
        sample(Sampler(length=6), Scripted(lambda r, c, t: peaked([5] * 6)), start=torch.full((1, 5), MASK))
    with pytest.raises(ValueError, match=r"one row of ids.*\(1, 2\)"):
        sample(Sampler(length=6), Scripted(lambda r, c, t: peaked([5] * 6)), suffix=torch.tensor([[4, 5]]))
    with pytest.raises(ValueError, match="1 keys for a prefix of 2 rows"):
        sample(Sampler(length=6), Scripted(lambda r, c, t: peaked([5] * 6)), count=2, keys=["a"])


# --- when it stops ---------------------------------------------------------------------------------------


def test_an_end_that_was_seen_is_not_undone():
    best = [[EOT, 6, 7, 8], [4, EOT, 7, 8], [4, 5, EOT, 8]]
    backbone = Scripted(lambda r, call, t: peaked(best[call], [[1, 1, 9, 8], [1, 9, 1, 1], [1, 1, 1, 1]][call]))
    sampler = Sampler(length=4, reviser=OverwriteAll(), early_stop="eot")
    sampled = sample(sampler, backbone, trace=True)
    # place 1 ends the text at the second step; the third unmasks place 0 and rewrites the end, in vain
    assert [step.tokens for step in sampled.traces[0]] == [
        [MASK, MASK, 7, MASK], [MASK, EOT, 7, MASK], [4, 5, EOT, MASK],
    ]  # fmt: skip
    assert sampled.ids.tolist() == [[4, EOT, EOS, EOS]]


@pytest.mark.parametrize("period", [1, 2, 3])
def test_a_cycle_ends_the_post_steps(period):
    script = lambda r, call, t: peaked([(int(t[0]) - 4 + 1) % period + 4, 9, 9])  # noqa: E731
    start = torch.tensor([[4, 9, 9], [4, 8, 9]])
    sampled = sample(Sampler(length=3, reviser=OverwriteAll(), post_steps=50), Scripted(script), count=2, start=start)
    # row 0 starts in the cycle and is back after `period` passes; row 1 first leaves its start for good
    assert sampled.forwards.tolist() == [period, period + 1]


def test_max_forwards_fills_the_rest_with_the_last_logits():
    backbone = Scripted(lambda r, call, t: peaked([4 + call] * 6, [6, 5, 4, 3, 2, 1]))
    sampled = sample(Sampler(length=6, blocks=2, max_forwards=2), backbone, trace=True)
    assert sampled.ids.tolist() == [[4, 5, 5, 5, 5, 5]]
    assert sampled.forwards.tolist() == [2]
    assert sampled.traces[0][-1].unmasked == [1, 2, 3, 4, 5]
    assert all(0 < p < 1 for p in sampled.traces[0][-1].confidence)
    drawn = sample(Sampler(length=6, max_forwards=1, temperature=9.0), Scripted(backbone.script))
    assert drawn.ids.tolist() == [[4] * 6]  # what the budget fills is the argmax at any temperature
    post = Sampler(length=6, tokens_per_step=6, reviser=OverwriteAll(), post_steps=9, max_forwards=3)
    assert sample(post, Scripted(backbone.script)).forwards.tolist() == [3]


# --- memory ----------------------------------------------------------------------------------------------


class Large(TorchDispatchMode):
    """Notes the operations that make a new tensor of at least `size` bytes."""

    def __init__(self, size):
        super().__init__()
        self.size, self.operations = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.operations += [str(func)] * (out.untyped_storage().nbytes() >= self.size)
        return out


@pytest.mark.parametrize("reviser", [None, OverwriteAll(), OverwriteAll(share=0.5)])
def test_a_greedy_step_makes_no_copy_of_the_logits(reviser):
    rows, length = 4, PART
    logits = torch.randn(rows * length, 300)  # every place of every row is asked
    special = SpecialIds(mask=MASK, eos=EOS, eot=EOT, banned=(BOS,), vocab_size=290)
    start = torch.full((rows, length), MASK)
    start[:, 1::2] = 7 if reviser else MASK
    sampler = Sampler(length=length, tokens_per_step=length, reviser=reviser)
    with Large(logits.nbytes) as large:
        sample(sampler, lambda prefix, tokens: logits.view(rows, length, 300), count=rows, special=special, start=start)
    assert large.operations == []


class Caches(TorchDispatchMode):
    """Counts the new tensors (B, H, T, d) with at least as many tokens as the prefix, by operation."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.counts = tokens, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_new = isinstance(out, torch.Tensor) and not func.is_view and "copy_" not in str(func)
        self.counts[str(func)] += is_new and out.ndim == 4 and out.shape[2] >= self.tokens
        return out


def test_rows_leave_the_batch_without_a_second_cache():
    model = small_model(V)
    prompts = torch.randint(4, V, (4, 50), generator=torch.Generator().manual_seed(0))
    start = torch.full((4, 6), MASK)
    for row, masks in enumerate((1, 6, 2, 4)):
        start[row, masks:] = 7
    sampler = Sampler(length=6)
    with torch.no_grad():
        prefix = model.encode_prefix({"prompt_ids": prompts})
    before = [(keys.clone(), values.clone()) for keys, values in prefix.cache]
    options = {"special": SPECIAL, "keys": list("abcd"), "seed": 0, "start": start}
    with Caches(50) as caches:
        sampled = sampler(model, prefix, **options)
    assert +caches.counts == {"aten.constant_pad_nd.default": 2 * len(before)}  # room for the response, once a layer
    assert sampled.forwards.tolist() == [1, 6, 2, 4]
    for old, new in zip(before, prefix.cache, strict=True):  # the rows are where they were
        assert all(torch.equal(a, b[:, :, :50]) for a, b in zip(old, new, strict=True))
    with Caches(50) as caches:
        again = sampler(model, prefix, **options)
    assert not +caches.counts
    assert torch.equal(again.ids, sampled.ids)
    full = Prefix(prefix.embeds, None, before)  # without room: keys and values are concatenated
    text = torch.randint(4, V, (4, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(prefix, text), model(full, text))


# --- temperature and seeds -------------------------------------------------------------------------------


def test_tokens_are_drawn_from_the_tempered_softmax_and_scored_by_the_plain_one():
    row = torch.full((V,), -math.inf)
    row[[5, 6, 7, 8]] = torch.tensor([1.0, 0.5, 0.0, -1.0])
    sampler = Sampler(length=5, tokens_per_step=5, temperature=0.5)
    sampled = sample(sampler, Scripted(lambda r, c, t: row.expand(5, V)), count=800, trace=True)
    expected = (row[[5, 6, 7, 8]] / 0.5).softmax(0) * 4000
    observed = torch.stack([(sampled.ids == token).sum() for token in (5, 6, 7, 8)])
    assert int(observed.sum()) == 4000
    assert float(((observed - expected) ** 2 / expected).sum()) < 16.3  # chi-square, 3 degrees of freedom, p = 0.001
    step, plain = sampled.traces[0][0], row.softmax(0)
    assert step.confidence == pytest.approx([float(plain[token]) for token in step.tokens])


def test_seeds_and_keys_decide_the_draw_and_the_global_generator_is_left_alone():
    sampler = Sampler(length=10, tokens_per_step=3, temperature=1.0)
    flat = lambda r, c, t: torch.zeros(10, V)  # noqa: E731
    state = torch.get_rng_state()
    first = sample(sampler, Scripted(flat), count=3, seed=5)
    again = sample(sampler, Scripted(flat), count=3, seed=5)
    other = sample(sampler, Scripted(flat), count=3, seed=6)
    moved = sample(sampler, Scripted(flat), count=1, seed=5, keys=["k2"])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.ids, again.ids)
    assert all((first.ids[row] != other.ids[row]).any() for row in range(3))
    assert (first.ids[0] != first.ids[1]).any()
    assert torch.equal(moved.ids[0], first.ids[2])


# --- trace and hooks -------------------------------------------------------------------------------------


class RemaskAlways(Reviser):
    """Remasks all that it may."""

    def remask(self, state, prediction):
        return state.visible


class LookTwice(Reviser):
    """At every second step, predicts again from a response whose masks are filled."""

    def refine(self, state, prediction, predict):
        (rows,) = read(state.step % 2 == 1)
        return predict.again(prediction, prediction.best, rows)


class RemaskFirst(Reviser):
    """Defines `remask` only."""

    def remask(self, state, prediction):
        return (state.visible.cumsum(1) == 1) & (state.step == 1)[:, None]


class Rewrite(Reviser):
    """Defines `overwrite` only."""

    def overwrite(self, state, prediction):
        return prediction.best


class OnlyRefine(Reviser):
    """Neither remasks nor overwrites."""

    def refine(self, state, prediction, predict):
        assert not (prediction.where & state.visible).any()
        return prediction


def test_a_hook_alone_acts_on_the_visible_places_of_the_block():
    backbone = Scripted(lambda r, call, t: peaked([4 + call] * 4, [4, 3, 2, 1]))
    remasked = sample(Sampler(length=4, steps=4, reviser=RemaskFirst()), backbone, trace=True)
    # step 2 unmasks place 1 and remasks place 0; three masks in two steps: 0 and 2 next, then 3
    assert [step.unmasked for step in remasked.traces[0]] == [[0], [1], [0, 2], [3]]
    assert [step.remasked for step in remasked.traces[0]] == [[], [0], [], []]
    assert (remasked.ids.tolist(), remasked.remasks.tolist()) == ([[6, 5, 6, 7]], [1])
    written = sample(Sampler(length=4, blocks=2, reviser=Rewrite()), Scripted(backbone.script), trace=True)
    # each block is written in two steps; the second one rewrites what the first unmasked, in its own block only
    assert [step.rewritten for step in written.traces[0]] == [[], [(0, 4, 5)], [], [(2, 6, 7)]]
    post = sample(Sampler(length=4, blocks=2, reviser=Rewrite(), post_steps=1), Scripted(backbone.script))
    assert post.ids.tolist() == [[8, 8, 8, 8]]
    for idle in (OnlyRefine(), Reviser()):
        sampled = sample(Sampler(length=4, reviser=idle), Scripted(backbone.script))
        assert (sampled.ids.tolist(), sampled.forwards.tolist()) == ([[4, 5, 6, 7]], [4])


def test_remasking_without_end_still_ends():
    sampler = Sampler(length=6, steps=4, blocks=2, reviser=RemaskAlways())
    sampled = sample(sampler, Scripted(lambda r, c, t: peaked([5] * 6)), count=2)
    assert sampled.ids.tolist() == [[5] * 6] * 2
    assert sampled.forwards.tolist() == [4, 4]


def test_a_refining_reviser_sees_filled_masks_and_its_passes_are_counted():
    backbone = Scripted(lambda r, call, t: peaked([4 + call] * 3, [3, 2, 1]))
    sampled = sample(Sampler(length=3, reviser=LookTwice()), backbone)
    # calls: 0 step 1, 1 step 2, 2 its second look (with call 1's guesses filled in), 3 step 3
    assert sampled.ids.tolist() == [[4, 6, 7]]
    assert sampled.forwards.tolist() == [4]
    assert backbone.seen[2].tolist() == [[4, 5, 5]]
