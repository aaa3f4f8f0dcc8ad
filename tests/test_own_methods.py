"""Our own methods: noise levels, trajectories, self-drafts, calibrated edits, against loops and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from datamodules.collate import Collate
from datamodules.shards import Sample
from src.cli.config import load_part
from src.cli.instantiate import build
from src.diffusion.corruption import Only, Span, Trajectory, start
from src.diffusion.losses import term_sum
from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.objectives.base import Setup
from src.objectives.calibrated import Calibrated, VisibleTerm
from src.objectives.refine import Refine
from src.objectives.revision import RevisionObjective
from src.objectives.sampler_levels import SamplerLevels
from src.objectives.self_draft import SelfDraft
from src.objectives.trajectories import Trajectories
from src.samplers.calibrated import CalibratedEdit
from src.samplers.sampler import Sampler
from src.text.tokenizer import Codec
from src.types import Batch, Corrupted, Kind
from tests.backbones import small_model
from tests.test_corruption import SPECIAL, make_batch
from tests.test_editing import ROWS, best, probabilities, table
from tests.test_editing import sample as sample_table
from tests.test_objectives import OPTIM, batch_with_prompt, brute_force, make, means, tiny_backbone, token_losses, total
from tests.test_sampler_configs import ROOT
from tests.test_sampler_configs import SPECIAL as SMALL

LENGTH = 12


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.train(["a large red ring is here"] * 3, vocab_size=300)


def drafted(sampler: Sampler, rows: int = 3):
    """Responses of a small random model, with the trace of every step."""
    model = small_model(SMALL.vocab_size, sharpness=1.0)
    prefix = model.encode_prefix({"prompt_ids": torch.arange(3 * rows).reshape(rows, 3) % 20 + 3})
    return sampler(model, prefix, special=SMALL, keys=[str(row) for row in range(rows)], seed=0, trace=True)


# 1. noise levels of the sampler


@pytest.mark.parametrize("settings", [{}, {"blocks": 2}, {"shift": 3.0}])
@pytest.mark.parametrize("speed", [1, 4, 5])
def test_the_levels_of_a_schedule_are_those_that_a_sampler_visits(settings, speed):
    sampler = Sampler(length=LENGTH, tokens_per_step=speed, **settings)
    for trace in drafted(sampler).traces or ():
        before = [[SMALL.mask] * LENGTH, *(step.tokens for step in trace[:-1])]
        assert sampler.schedule.levels == [tokens.count(SMALL.mask) / LENGTH for tokens in before]


def test_levels_are_drawn_evenly_by_speed_and_then_by_step():
    setup = Setup(backbone=tiny_backbone, special=SPECIAL, optim=OPTIM)
    objective = SamplerLevels(setup, response_length=LENGTH, tokens_per_step=[3, 6, 8], unmasked=0.25)
    number = 2 * 4 * 3 * 400  # quantiles, evenly spaced
    levels = objective.levels((torch.arange(number, dtype=torch.float64) + 0.5) / number).tolist()
    # 4, 2 and 2 steps (8 tokens/step are two steps of 6); each speed has a quarter of the rows
    all_masks = half = 1 / 16 + 1 / 8 + 1 / 8
    expected = {0.0: 1 / 4, 1.0: all_masks, 9 / 12: 1 / 16, 6 / 12: half, 3 / 12: 1 / 16}
    shares = {round(level, 6): levels.count(level) / number for level in set(levels)}
    assert shares == pytest.approx({round(level, 6): share for level, share in expected.items()}, abs=2e-3)


def test_the_loss_at_these_levels_is_that_of_stage_one():
    batch = batch_with_prompt()
    setup = Setup(backbone=tiny_backbone, special=SPECIAL, optim=OPTIM)
    objective = SamplerLevels(setup, response_length=LENGTH, tokens_per_step=[4], unmasked=0.5)
    assert set(objective.corrupt(batch)[0].rate.tolist()) <= {0.0, *torch.tensor([1.0, 8 / 12, 4 / 12]).tolist()}
    assert total(objective, batch).item() == pytest.approx(brute_force(objective, batch), rel=1e-4)
    with pytest.raises(UserError, match="no room for t_min"):
        SamplerLevels(setup, response_length=LENGTH, t_min=0.1)


# 2. trajectories


@pytest.mark.parametrize("name", ["plain", "refine", "remdm_llada", "token_to_mask", "edit_quality", "uniform"])
def test_a_sampler_says_which_step_last_unmasked_each_token(name):
    sampler = build({**load_part("sampler", name, root=ROOT / "conf"), "length": LENGTH}).with_steps(tokens_per_step=2)
    sampled = drafted(sampler)
    for row, trace in enumerate(sampled.traces or ()):
        expected = [-1] * LENGTH
        for number, step in enumerate(trace):
            for place in step.unmasked:
                expected[place] = number
        assert sampled.unmasked_at[row].tolist() == expected


def as_drafts(sampled, *, span: tuple[int, int]) -> Batch:
    """Sampled responses as rows of a round, in which the expert corrected the tokens of a span."""
    ids = torch.tensor([trace[-1].tokens for trace in sampled.traces])
    spans = torch.zeros_like(ids)
    spans[:, span[0] : span[1]] = 1
    right = torch.where(spans > 0, ids % 20 + 4, ids)
    everywhere, keys = torch.ones_like(ids, dtype=torch.bool), [f"k{row}" for row in range(len(ids))]
    batch = Batch({}, right, everywhere, ids, spans, everywhere[:, 0], keys)
    return replace(batch, unmasked_at=sampled.unmasked_at)


def test_a_trajectory_shows_the_states_that_the_sampler_passed_through():
    sampled = drafted(Sampler(length=LENGTH, tokens_per_step=2))
    batch = as_drafts(sampled, span=(3, 6))
    corruption = lambda state: Only(Span(num=None, kind=Kind.MISTAKE), rest=Kind.DRAFT)(  # noqa: E731
        batch, Trajectory(special=SMALL)(batch, state, Noise(batch.keys, seed=0)), Noise(batch.keys, seed=0)
    )
    for masked_steps in range(6):  # of six
        state = corruption(start(batch, torch.full((3,), (masked_steps + 0.5) / 6)))
        for row, trace in enumerate(sampled.traces or ()):
            assert state.tokens[row].tolist() == trace[5 - masked_steps].tokens
            kinds = [
                Kind.MASK if token == SMALL.mask else Kind.MISTAKE if 3 <= place < 6 else Kind.DRAFT
                for place, token in enumerate(trace[5 - masked_steps].tokens)
            ]
            assert state.kind[row].tolist() == kinds
            assert state.target[row].tolist() == batch.response[row].tolist()


def test_the_loss_on_trajectories_equals_the_written_out_loop():
    batch = batch_with_prompt(padding=0)
    batch.drafted[::2] = True
    steps = torch.arange(LENGTH).expand(6, -1).flip(1).clone()
    steps[~batch.drafted] = -1
    batch = replace(batch, unmasked_at=steps)
    objective = make(Trajectories, rate=0.3, keep=0.5, t_min=0.0)
    assert total(objective, batch).item() == pytest.approx(brute_force(objective, batch), rel=1e-4)
    state, plain = objective.corrupt(batch)[0], make(Refine, rate=0.3, keep=0.5, t_min=0.0).corrupt(batch)[0]
    assert torch.equal(state.tokens[1::2], plain.tokens[1::2])  # Stage I data are as without it
    masks = [math.floor(t * LENGTH) for t in state.rate[::2].tolist()]
    assert state.where(Kind.MASK)[::2].sum(1).tolist() == masks


def test_a_round_that_kept_no_steps_is_named_and_serves_plain_stage_two():
    batch = make_batch(4)
    batch.drafted[:] = True
    with pytest.raises(UserError, match=r"did not keep when each token was unmasked.* conf=stage2"):
        make(Trajectories).corrupt(batch)
    assert make(Refine).corrupt(batch)[0].where(Kind.MISTAKE).any()


def test_collated_drafts_carry_their_steps(codec):
    ids = [*codec.encode("large red ring")[0], codec.eot_id]
    record = {"prompt": "Describe.", "draft_ids": ids, "spans": []}
    caption = {"prompt": "Describe.", "captions": [{"text": "red ring"}]}
    collate = Collate(codec, response_length=8, layout=None, seed=0)

    def steps(*records: dict) -> list | None:
        samples = [Sample(f"k{n}", record, None, None, 0, n) for n, record in enumerate(records)]
        found = collate(samples)[0].unmasked_at
        return None if found is None else found.tolist()

    assert steps(caption) == [[-1] * 8]
    kept = {**record, "unmasked_at": [3, 0, 1, 2, 5]}
    assert steps(kept, caption) == [[3, 0, 1, 2, 5, 5, 5, 5], [-1] * 8]
    assert steps(kept, record) is None


# 3. self-drafts


def test_a_self_draft_equals_the_written_out_loop():
    batch = batch_with_prompt(8)
    objective = make(SelfDraft, mistake=0.7, keep=0.3, rate=0.2)
    (state,) = objective.corrupt(batch)
    shares = Noise(batch.keys, seed=0, draw="0/passes").level().tolist()
    mistake = keep = 0.0
    num_mistakes = 0
    for row in range(len(batch)):
        length = int(batch.editable[row].sum())
        part = batch.rows(slice(row, row + 1))
        prefix = objective.backbone.encode_prefix(part.prefix)
        logits = objective.backbone(prefix, state.tokens[row : row + 1, :length])[0].double().tolist()
        allowed = [i for i in range(SPECIAL.vocab_size) if i not in {SPECIAL.mask, *SPECIAL.banned}]
        guess = [max(allowed, key=lambda i, place=place: place[i]) for place in logits]
        sure = [math.exp(place[g]) / sum(map(math.exp, place)) for place, g in zip(logits, guess, strict=True)]
        is_end = [g in (SPECIAL.eos, SPECIAL.eot) for g in guess]
        masks = [i for i in range(length) if state.tokens[row, i] == SPECIAL.mask]
        masks.sort(key=lambda i: (is_end[i], -sure[i]))
        shown = masks[: math.ceil(shares[row] * len(masks))]
        tokens = state.tokens[row : row + 1].clone()
        for i in shown:
            tokens[0, i] = guess[i]
        second = Corrupted(tokens, *(getattr(state, n)[row : row + 1] for n in ("target", "kind", "rate")))
        losses = token_losses(objective.backbone, part, second)[0]
        wrong = [i for i in shown if guess[i] != batch.response[row, i]]
        right = [i for i in shown if i not in wrong]
        mistake += sum(losses[i] for i in wrong) / max(1, len(wrong)) / len(batch)
        keep += sum(losses[i] for i in right) / max(1, len(right)) / len(batch)
        num_mistakes += len(wrong)
    found = means(objective, batch)
    assert found["mistake"].item() == pytest.approx(mistake, rel=1e-4)
    assert found["keep"].item() == pytest.approx(keep, rel=1e-4)
    stage1 = make(RevisionObjective, rate=0.2)
    expected = total(stage1, batch).item() + 0.7 * mistake + 0.3 * keep
    assert total(objective, batch).item() == pytest.approx(expected, rel=1e-4)
    assert num_mistakes > 10


# 4. calibrated edits


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_one_mean_over_visible_tokens_has_the_true_probability_as_optimum(share):
    """A token is right with probability q = 1 - share, and the input does not tell. A mean of each kind yields 1/2."""
    places = 1000
    kind = torch.full((1, places), int(Kind.CLEAN), dtype=torch.uint8)
    kind[:, : round(places * share)] = int(Kind.SYNTAX)
    state = Corrupted(torch.full((1, places), 7), torch.full((1, places), 7), kind, torch.full((1,), 0.5))

    def optimum(terms) -> float:
        def loss(p: float) -> float:
            values = torch.where(state.where(Kind.CLEAN), -math.log(p), -math.log(1 - p))
            return sum(term.coef * term_sum(term, values, state).item() for term in terms)

        return min((i / 1000 for i in range(1, 1000)), key=loss)

    assert optimum(make(Calibrated).terms) == pytest.approx(1 - share, abs=1e-3)
    assert optimum(make(RevisionObjective).terms) == pytest.approx(0.5, abs=1e-3)


def test_the_calibrated_loss_equals_the_written_out_loop():
    batch = batch_with_prompt()
    objective = make(Calibrated, visible=0.5, rate=0.3)
    (state,) = objective.corrupt(batch)
    expected = 0.0
    wrong = words = 0
    for row, losses in enumerate(token_losses(objective.backbone, batch, state)):
        masks = [v for i, v in enumerate(losses) if state.tokens[row, i] == SPECIAL.mask]
        visible = [v for i, v in enumerate(losses) if state.tokens[row, i] != SPECIAL.mask]
        expected += (sum(masks) / max(1, len(masks)) + 0.5 * sum(visible) / max(1, len(visible))) / len(batch)
        shown = [i for i in range(len(losses)) if state.tokens[row, i] != SPECIAL.mask]
        words += len(shown)
        wrong += sum(int(state.tokens[row, i] != batch.response[row, i]) for i in shown)
    assert objective._counts["visible_wrong"].tolist() == [wrong, words]
    assert total(objective, batch).item() == pytest.approx(expected, rel=1e-4)
    assert isinstance(objective.terms[1], VisibleTerm)


def test_the_estimate_of_the_share_of_errors_is_the_maximum_likelihood():
    """A sign shows on 80 % of the wrong tokens and on 10 % of the right ones: of 1000 tokens, 300 wrong, on 310."""
    prior, wrong, right, signs = 0.1, 0.8, 0.1, 310
    with_sign = prior * wrong / (prior * wrong + (1 - prior) * right)
    without = prior * (1 - wrong) / (prior * (1 - wrong) + (1 - prior) * (1 - right))
    p_wrong = torch.tensor([[with_sign] * signs + [without] * (1000 - signs) + [0.5] * 7], dtype=torch.float64)
    where = torch.arange(1007)[None] < 1000
    found = CalibratedEdit(prior=prior, rounds=500)._share(p_wrong, where)
    assert found.item() == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize(("prior", "rounds"), [(0.1, 3), (0.4, 8), (0.9, 1)])
def test_calibrated_edits_equal_the_written_out_rule(prior, rounds):
    reviser = CalibratedEdit(prior=prior, rounds=rounds)
    for row in range(ROWS):
        model = table()
        sampled = sample_table(Sampler(length=LENGTH, tokens_per_step=3, reviser=reviser), model, rows=[row])
        x = [0] * LENGTH
        for step in range(4):
            shares = probabilities(model.say(row, x))
            visible = [i for i in range(LENGTH) if x[i] != 0]
            pi = prior
            for _ in range(rounds if visible else 0):
                odds = [
                    (1 - shares[i].get(x[i], 0.0)) * pi / prior
                    / ((1 - shares[i].get(x[i], 0.0)) * pi / prior + shares[i].get(x[i], 0.0) * (1 - pi) / (1 - prior))
                    for i in visible
                ]  # fmt: skip
                pi = min(max(sum(odds) / len(odds), 1e-6), 1 - 1e-6)
            new = list(x)
            for i in visible:
                v = best(shares[i])
                if shares[i][v] * pi / prior >= shares[i].get(x[i], 0.0) * (1 - pi) / (1 - prior):
                    new[i] = v
            hidden = sorted((i for i in range(LENGTH) if x[i] == 0), key=lambda i: -shares[i][best(shares[i])])
            for i in hidden[: math.ceil(len(hidden) / (4 - step))]:
                new[i] = best(shares[i])
            x = new
        assert sampled.traces[0][-1].tokens == x
