"""ReMDM and its relatives: the share that is visible, each step's frequencies, and loops written out.

A backbone that says the same of a position at any time makes every probability known.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from src.samplers.remdm import Cap, Confident, KeepSurest, Loop, RemaskLowest, Rescale
from src.samplers.sampler import Sampler
from src.samplers.unmask import Bernoulli, Threshold
from src.types import SpecialIds
from tests.backbones import Fixed, Recording, rows_of, small_model

MASK, EOS, EOT, V = 0, 1, 2, 12
SPECIAL = SpecialIds(mask=MASK, eos=EOS, eot=EOT, banned=(MASK,), vocab_size=V)
LOOP = {"t_on": 0.75, "t_off": 0.25, "share": 0.8}


def fixed(length, *, scale=1.5):
    logits = torch.randn(length, V, generator=torch.Generator().manual_seed(0)) * scale
    logits[:, [MASK, EOT]] = -math.inf
    return Fixed(logits[None])


def run(sampler, rows, backbone=None, *, seed=0, start=None):
    """Result, and the texts (B, T + 1, L) before the first step and after each; of a row that is over, its last."""
    keys = [f"k{row}" for row in rows]
    backbone = backbone or fixed(sampler.length)
    options = {"special": SPECIAL, "keys": keys, "seed": seed, "trace": True, "start": start}
    sampled = sampler(backbone, rows_of(rows), **options)
    first = [[MASK] * sampler.length] * len(keys) if start is None else start.tolist()
    texts = [[a, *(step.tokens for step in trace)] for a, trace in zip(first, sampled.traces, strict=True)]
    most = max(map(len, texts))
    return sampled, torch.tensor([row + row[-1:] * (most - len(row)) for row in texts])


def sampler(reviser, *, length, steps, unmask=None, temperature=1.0, **settings):
    unmask = unmask or Bernoulli()
    return Sampler(length=length, steps=steps, unmask=unmask, reviser=reviser, temperature=temperature, **settings)


# --- equivalence -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reviser", [Cap(eta=0), Rescale(eta=0), Confident(eta=0)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_with_eta_0_each_step_is_that_of_the_ancestral_sampler(reviser, blocks):
    settings = {"length": 16, "steps": 12, "blocks": blocks}
    plain, texts = run(sampler(None, **settings), range(20))
    sampled, ours = run(sampler(reviser, **settings), range(20))
    assert torch.equal(sampled.ids, plain.ids)
    if blocks == 1:  # a full block is left at once by the plain sampler only
        assert torch.equal(ours[:, : texts.shape[1]], texts)
        assert torch.equal(sampled.forwards, plain.forwards)


# --- the share that is visible ---------------------------------------------------------------------------


def shares_of(reviser, steps):
    """a after each step, by the formulas of the paper."""
    times = [1 - (i + 1) / steps for i in range(steps)]
    if not isinstance(reviser, Loop):
        return [1 - t for t in times]
    on, off, share = reviser.t_on, reviser.t_off, reviser.share
    rising = [share * (1 - t) / (1 - on) for t in times]
    return [
        r if t > on else share if t >= off else 1 - (1 - share) * t / off for r, t in zip(rising, times, strict=True)
    ]


MARGINALS = [
    *((reviser, 32, 200) for reviser in (Cap(eta=0.2), Rescale(eta=0.3), Loop(eta=0.2, **LOOP))),
    *((reviser, 3, 800) for reviser in (Cap(eta=1.0), Rescale(eta=0.5), Loop(eta=0.5, **LOOP))),  # often full
    (Confident(compensate=True), 32, 200),  # with few tokens its clip would show
    (Loop(eta=0.1, t_on=0.7, t_off=0.3, share=0.8), 40, 200),  # steps across the borders of its phases
]


@pytest.mark.parametrize(("reviser", "length", "rows"), MARGINALS, ids=lambda value: getattr(value, "eta", value))
def test_the_share_that_is_visible_is_that_of_the_schedule(reviser, length, rows):
    steps = 16
    sampled, texts = run(sampler(reviser, length=length, steps=steps), range(rows))
    assert texts.shape[1] == steps + 1
    for number, share in enumerate(shares_of(reviser, steps), 1):
        seen = float((texts[:, number] != MASK).double().mean())
        error = math.sqrt(max(share * (1 - share), 0) / (rows * length))
        assert abs(seen - share) <= 4 * error + 1e-9, (number, seen, share)
    assert (sampled.remasks > 0).double().mean() > 0.3


# --- frequencies of each step ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reviser", [Cap(eta=0.15), Rescale(eta=0.4), Loop(eta=0.15, **LOOP)], ids=lambda r: type(r).__name__
)
def test_a_step_hides_and_unmasks_with_the_probabilities_of_the_paper(reviser):
    length, steps, rows = 12, 8, 400
    backbone = fixed(length)
    _, texts = run(sampler(reviser, length=length, steps=steps), range(rows), backbone)
    shares = [0.0, *shares_of(reviser, steps)]
    for step, (before, after) in enumerate(pairwise(shares)):
        limit = min(1.0, (1 - after) / before) if before else 1.0
        time = 1 - step / steps
        middle = LOOP["t_off"] < time <= LOOP["t_on"]
        sigma = {Cap: min(0.15, limit), Rescale: 0.4 * limit, Loop: min(0.15, limit) * middle}[type(reviser)]
        rho = (after - (1 - sigma) * before) / (1 - before)
        was, now = texts[:, step] != MASK, texts[:, step + 1] != MASK
        both = ((was, was & ~now, sigma), (~was, ~was & now, rho))
        for number, hits, chance in ((int(a.sum()), int(b.sum()), p) for a, b, p in both):
            assert abs(hits - number * chance) <= 4 * math.sqrt(max(number * chance * (1 - chance), 0)) + 1e-6, step
        assert (texts[:, step + 1] == texts[:, step])[was & now].all()  # a visible token is hidden or stays
    share = backbone.logits[0].double().softmax(-1)  # (L, V)
    observed = torch.stack([(texts[:, -1] == token).sum(0) for token in range(V)], 1)
    error = (rows * share * (1 - share)).sqrt()
    often = rows * share >= 5  # where counts are nearly normal
    assert ((observed - rows * share).abs() <= 5 * error)[often].all() and observed[share == 0].sum() == 0


@pytest.mark.parametrize("compensate", [False, True])
def test_conf_hides_the_tokens_that_were_improbable(compensate):
    length, steps, rows, eta = 6, 6, 3000, 0.9
    backbone = fixed(length, scale=3.0)
    reviser = Confident(eta=eta, compensate=compensate)
    _, texts = run(sampler(reviser, length=length, steps=steps, temperature=0), range(rows), backbone)
    sure = backbone.logits[0].double().softmax(-1).amax(-1).tolist()  # of the one token that is ever written
    for step in range(1, steps):
        before, after = step / steps, (step + 1) / steps
        limit = eta * min(1.0, (1 - after) / before)
        hidden, spread, unmasked, noise = [0.0] * length, [0.0] * length, 0.0, 0.0
        was = (texts[:, step] != MASK).tolist()
        for row in was:
            weights = [math.exp(-c) if v else 0.0 for c, v in zip(sure, row, strict=True)]
            sigma = [limit * w / (sum(weights) or 1) for w in weights]
            masks = row.count(False)
            rho = 1 / (steps - step)
            if compensate and masks:
                kept = sum(1 - s for s, v in zip(sigma, row, strict=True) if v)
                rho = min(max((length * after - kept) / masks, 0), 1)
            hidden = [h + s for h, s in zip(hidden, sigma, strict=True)]
            spread = [h + s * (1 - s) for h, s in zip(spread, sigma, strict=True)]
            unmasked, noise = unmasked + masks * rho, noise + masks * rho * (1 - rho)
        now = texts[:, step + 1] != MASK
        old = torch.tensor(was)
        for sampled, expected, variance in zip((old & ~now).sum(0).tolist(), hidden, spread, strict=True):
            assert abs(sampled - expected) <= 4 * math.sqrt(variance) + 1e-6
        assert abs(int((~old & now).sum()) - unmasked) <= 4 * math.sqrt(noise) + 1e-6


# --- rows, ends, settings --------------------------------------------------------------------------------

REVISERS = [
    (Cap(eta=0.3), {}),
    (Rescale(eta=0.3), {"blocks": 2}),
    (Confident(), {"max_forwards": 5}),
    (Confident(compensate=True), {"top_p": 0.7}),
    (Loop(eta=0.3), {}),
    (Loop(eta=0.3), {"early_stop": "eot", "blocks": 2}),
    (RemaskLowest(number=2), {"blocks": 2}),
    (RemaskLowest(number=2), {"unmask": Threshold(0.3)}),
    (Cap(eta=0.3), {"unmask": Threshold(0.5, scheduled=False)}),
    (Cap(eta=0.3), {"score": "random", "unmask": None}),
]


def ids(value):
    return "-".join([type(value).__name__]) if not isinstance(value, dict) else ",".join(value) or "plain"


@pytest.mark.parametrize(("reviser", "settings"), REVISERS, ids=ids)
def test_rows_are_their_own_and_every_one_ends(reviser, settings):
    settings = {"unmask": Bernoulli(), **settings}
    given = Sampler(length=16, steps=12, reviser=reviser, temperature=1.0, **settings)
    backbone = fixed(16)
    backbone.logits[0, :, EOT] = 0.0
    together, texts = run(given, range(6), backbone)
    again, _ = run(given, range(6), backbone)
    other, _ = run(given, range(6), backbone, seed=1)
    assert torch.equal(together.ids, again.ids)
    assert not torch.equal(together.ids, other.ids)
    for row in range(6):
        alone, _ = run(given, [row], backbone)
        assert alone.traces[0] == together.traces[row]
        assert alone.ids[0].tolist() == together.ids[row].tolist()
        assert (alone.forwards[0], alone.remasks[0]) == (together.forwards[row], together.remasks[row])
    assert MASK not in together.ids
    assert together.remasks.sum() > 0
    assert texts.shape[1] - 1 <= 12 or settings["unmask"] == Threshold(0.5, scheduled=False)
    if "max_forwards" in settings:
        assert together.forwards.max() <= 5


@pytest.mark.parametrize("reviser", [Cap(eta=0.5), Confident(), Loop(eta=0.2)], ids=ids)
def test_a_full_text_waits_for_its_steps_without_calls(reviser):
    backbone = fixed(3)
    sampled, texts = run(sampler(reviser, length=3, steps=6), range(50), backbone)
    asked = [sum(row == r for r, _ in backbone.texts) for row in range(50)]
    assert sampled.forwards.tolist() == asked
    assert all(len(trace) == 6 for trace in sampled.traces)
    full = (texts[:, 1:-1] != MASK).all(2)
    assert full.any()
    assert not any(MASK not in text for _, text in backbone.texts)


def test_a_given_beginning_is_never_hidden():
    start = torch.full((30, 12), MASK)
    start[:, ::3] = 7
    for reviser in (Cap(eta=1.0), Confident(), RemaskLowest(number=3), KeepSurest()):
        unmask = Bernoulli() if isinstance(reviser, Cap | Confident) else None
        given = Sampler(length=12, steps=8, unmask=unmask, reviser=reviser, temperature=1.0)
        sampled, texts = run(given, range(30), start=start)
        assert (texts[:, :, ::3] == 7).all()
        assert sampled.remasks.sum() > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Loop(t_on=0.2, t_off=0.5), "t_off=0.5 t_on=0.2"),
        (lambda: Sampler(length=8, steps=2, reviser=Cap(eta=0.1), unmask=Bernoulli()), "at least 3 steps a block.*2"),
        (lambda: Sampler(length=8, steps=2, reviser=Loop(), unmask=Bernoulli()), "of 2 steps a block none begins"),
        (lambda: Sampler(length=8, steps=1, reviser=RemaskLowest()), "share=0.5 of 1 steps"),
        (lambda: Sampler(length=8, reviser=KeepSurest(), eos_last=True), "KeepSurest chooses"),
        (lambda: Sampler(length=8, reviser=KeepSurest(), unmask=Threshold(0.5)), r"KeepSurest.*tau=0\.5"),
        (lambda: Sampler(length=8, reviser=Cap(eta=0.1), post_steps=2), "post_steps only rewrite, which Cap never"),
    ],
)
def test_settings_that_can_never_act_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- by confidence, in fixed numbers: loops written out --------------------------------------------------

PROMPTS = torch.tensor([[4, 9, 7], [5, 6, 11], [10, 4, 3]])


@pytest.fixture(scope="module")
def model():
    return small_model(V)


@torch.no_grad()
def predict(model, prompt, x):
    """Best token and its probability at each place, and all probabilities."""
    logits = model(model.encode_prefix({"prompt_ids": prompt[None]}), torch.tensor([x]))[0].double()
    logits[:, MASK] = -math.inf
    share = logits.softmax(-1)
    return share.argmax(-1).tolist(), share.amax(-1).tolist(), share


def port(model, prompt, *, length, blocks, number, writing, begin):
    """The official loop for LLaDA, greedily: (text, texts asked about). 2 * writing steps a block."""
    x, size, asked = [MASK] * length, length // blocks, []
    for first in range(0, length, size):
        cache = [math.inf] * length
        places = range(first, first + size)
        even = [size // writing + (i < size % writing) for i in range(writing)]
        plan = [*even[:begin], *[None] * writing, *even[begin:]]
        for count in plan:
            if count is None:
                done = sorted((i for i in places if x[i] != MASK), key=lambda i: cache[i])
                for i in done[:number]:
                    x[i], cache[i] = MASK, math.inf
            if MASK not in x[first : first + size]:
                break
            asked.append(list(x))
            best, sure, _ = predict(model, prompt, x)
            for i in sorted((i for i in places if x[i] == MASK), key=lambda i: -sure[i])[: count or number]:
                x[i], cache[i] = best[i], sure[i]
    return x, asked


@pytest.mark.parametrize(
    ("length", "blocks", "number", "writing"),
    [(8, 1, 1, 8), (16, 2, 2, 8), (16, 1, 4, 8), (12, 1, 3, 4), (12, 2, 1, 6)],
)
@torch.no_grad()
def test_remasking_the_lowest_is_the_official_loop(model, length, blocks, number, writing):
    begin = math.ceil(writing * 7 / 8)
    reviser = RemaskLowest(number=number)
    given = Sampler(length=length, steps=2 * writing * blocks, blocks=blocks, reviser=reviser)
    for prompt in PROMPTS:
        recording = Recording(model)
        prefix = model.encode_prefix({"prompt_ids": prompt[None]})
        sampled = given(recording, prefix, special=SPECIAL, keys=["a"], seed=0, trace=True)
        text, asked = port(model, prompt, length=length, blocks=blocks, number=number, writing=writing, begin=begin)
        assert sampled.traces[0][-1].tokens == text
        assert [ids for _, ids in recording.texts] == [x for i, x in enumerate(asked) if i == 0 or x != asked[i - 1]]
        assert int(sampled.forwards[0]) == len(recording.texts)


def keep(model, prompt, *, length, blocks, steps):
    """RemeDi's sampler: the text after each step."""
    x, size, texts = [MASK] * length, length // blocks, []
    for first in range(0, length, size):
        for step in range(1, steps + 1):
            best, sure, share = predict(model, prompt, x)
            filled = [b if t == MASK else t for b, t in zip(best, x, strict=True)]
            surety = [s if t == MASK else float(p[t]) for s, t, p in zip(sure, x, share, strict=True)]
            order = sorted(range(first, first + size), key=lambda i: -surety[i])
            for rank, i in enumerate(order):
                x[i] = filled[i] if rank < math.ceil(size * step / steps) else MASK
            texts.append(list(x))
    return texts


@pytest.mark.parametrize(("blocks", "steps"), [(1, 6), (2, 4), (3, 4), (1, 5)])
@torch.no_grad()
def test_keeping_the_surest_is_remedis_loop(model, blocks, steps):
    given = Sampler(length=12, steps=steps * blocks, blocks=blocks, reviser=KeepSurest())
    prefix = model.encode_prefix({"prompt_ids": PROMPTS})
    sampled = given(model, prefix, special=SPECIAL, keys=list("abc"), seed=0, trace=True)
    for row, prompt in enumerate(PROMPTS):
        expected = keep(model, prompt, length=12, blocks=blocks, steps=steps)
        assert [step.tokens for step in sampled.traces[row]] == expected
    assert sampled.remasks.sum() > 0
