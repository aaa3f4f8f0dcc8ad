"""Objectives of several passes: against written-out loops, and the memory that a pass leaves behind."""

from __future__ import annotations

import gc
import math
from types import SimpleNamespace

import pytest
import torch

from src.diffusion.corruption import Replace
from src.objectives.base import Objective
from src.objectives.complementary import ComplementaryMasks
from src.objectives.edit_noise import EditNoiseObjective
from src.objectives.hybrid import HybridNoise
from src.objectives.mask import MaskPrediction
from src.objectives.optim import Optim
from src.objectives.proseco import ProSeCo
from src.objectives.uniform import UniformNoise
from src.training.memory_plan import Live
from src.types import Batch, Corrupted, Kind
from testing.one_graph import one_graph
from tests.test_corruption import SPECIAL
from tests.test_objectives import Oracle, batch_with_prompt, gradients, make, means, tiny_backbone, token_losses, total

BANNED = {SPECIAL.mask, *SPECIAL.banned}


def best_tokens(objective: Objective, batch: Batch, tokens: torch.Tensor) -> list[list[int]]:
    """The most probable token that may be written at each place, one row at a time."""
    predicted = []
    for row in range(len(batch)):
        length = int(batch.editable[row].sum())
        prefix = objective.backbone.encode_prefix({"prompt_ids": batch.prefix["prompt_ids"][row : row + 1]})
        logits = objective.backbone(prefix, tokens[row : row + 1, :length])[0].tolist()
        ids = [i for i in range(SPECIAL.vocab_size) if i not in BANNED]
        predicted.append([max(ids, key=lambda i, place=place: place[i]) for place in logits])
    return predicted


def written_out(objective: ProSeCo, batch: Batch, *, fill: str, errors: bool, weighted: bool, reduce: str) -> float:
    """ProSeCo's loss from its formulas, a loop over rows and positions (no replacements)."""
    (state,) = objective.corrupt(batch)
    first = token_losses(objective.backbone, batch, state)
    draft = batch.response.clone()
    for row, tokens in enumerate(best_tokens(objective, batch, state.tokens)):
        for place, token in enumerate(tokens):
            if fill == "all" or state.tokens[row, place] == SPECIAL.mask:
                draft[row, place] = token
    second = token_losses(objective.backbone, batch, Corrupted(draft, state.target, state.kind, state.rate))
    summed = 0.0
    for row in range(len(batch)):
        weight = 1 / state.rate[row].item()
        masked = sum(v for i, v in enumerate(first[row]) if state.tokens[row, i] == SPECIAL.mask)
        corrected = 0.0
        for place, value in enumerate(second[row]):
            right = draft[row, place] == batch.response[row, place]
            corrected += -math.exp(-value) if errors and right else value
        part = weight * masked + (weight if weighted else 1.0) * corrected
        summed += part / len(first[row]) if reduce == "answer_len" else part
    return summed / (len(batch) if reduce == "answer_len" else int(batch.editable.sum()))


@pytest.mark.parametrize("fill", ["all", "masked"])
@pytest.mark.parametrize(("errors", "weighted", "reduce"), [(False, True, "batch_tokens"), (True, False, "answer_len")])
def test_proseco_equals_the_written_out_loop(fill, errors, weighted, reduce):
    batch = batch_with_prompt()
    objective = make(
        ProSeCo, fill=fill, errors=errors, correct_weight="inverse_rate" if weighted else "one", reduce=reduce
    )
    expected = written_out(objective, batch, fill=fill, errors=errors, weighted=weighted, reduce=reduce)
    assert total(objective, batch).item() == pytest.approx(expected, rel=1e-4)


TWO_VIEWS = Optim(lr=1e-3, views=2, antithetic=True)
OBJECTIVES = {
    "proseco": lambda: make(ProSeCo, rate=0.1),
    "proseco-errors": lambda: make(ProSeCo, errors=True, pick="sample", fill="masked"),
    "edits": lambda: make(EditNoiseObjective, rate=0.5),
    "complementary": lambda: make(ComplementaryMasks),
    "hybrid": lambda: make(HybridNoise, share=0.3),
    "uniform": lambda: make(UniformNoise),
    "two views": lambda: make(ProSeCo, optim=TWO_VIEWS),
    "shift": lambda: make(ProSeCo, backbone=lambda: tiny_backbone(shift=True)),
    "full attention": lambda: make(ProSeCo, backbone=lambda: tiny_backbone(attention="full")),
}


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_backward_pass_after_each_pass_changes_no_gradient(name, micro):
    """Nor do micro-batches: the denominators are those of the whole batch."""
    batch = batch_with_prompt(6, padding=0)
    reference, objective = OBJECTIVES[name](), OBJECTIVES[name]()
    one_graph(reference, batch)
    expected = gradients(reference)
    parts = [(part, objective.corrupt(part)) for part in batch.split(micro or len(batch))]
    totals = objective.denominators(parts)
    for part, views in parts:
        objective.forward_backward(part, views, totals)
    assert expected.norm() > 0
    torch.testing.assert_close(gradients(objective), expected, rtol=1e-4, atol=1e-6)


def fullest(objective: Objective, batch: Batch) -> int:
    """Bytes at the fullest moment of a real step, gradients there already, one backward pass after each pass."""
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    views = objective.corrupt(batch)
    totals = objective.denominators([(batch, views)])
    gc.collect()
    with Live() as live:
        live.enter("step", "made")
        objective.forward_backward(batch, views, totals)
    return live.peaks["step"]["made"]


def test_two_passes_take_the_memory_of_one():
    """Mask prediction that hides everything has the logits that ProSeCo needs; twice its graph would be twice that."""
    batch = batch_with_prompt(40, padding=0)
    one = fullest(make(MaskPrediction, t_min=0.999999), batch)
    assert fullest(make(ProSeCo, t_min=0.999999), batch) < 1.15 * one
    assert fullest(make(ProSeCo, t_min=0.999999, optim=TWO_VIEWS), batch) < 1.25 * one


def drafts(objective: ProSeCo, batch: Batch) -> torch.Tensor:
    """The input of each second pass, (views, B, L)."""
    seen, second_input = [], objective.second_input

    def watched(*args):
        seen.append(second_input(*args))
        return seen[-1]

    objective.second_input = watched
    total(objective, batch)
    return torch.stack([state.tokens for state in seen])


def test_a_draft_belongs_to_its_sample_whatever_the_batch():
    batch = batch_with_prompt(6, padding=0)
    for options in ({"pick": "sample"}, {"rate": 0.3}):
        whole = drafts(make(ProSeCo, **options), batch)[0]
        alone = [drafts(make(ProSeCo, **options), part)[0] for part in batch.split(1)]
        assert torch.equal(whole, torch.cat(alone))
        assert torch.equal(whole, drafts(make(ProSeCo, **options), batch)[0])


def test_samples_of_a_draft_follow_the_network():
    """One position, many rows: the shares of the tokens are the probabilities among those that may be written."""
    batch = batch_with_prompt(1, padding=0)
    rows = 3000
    batch = Batch(
        {"prompt_ids": batch.prefix["prompt_ids"].expand(rows, -1)},
        *(tensor[:, :1].expand(rows, -1).clone() for tensor in (batch.response, batch.editable, batch.flawed)),
        batch.span[:, :1].expand(rows, -1).clone(), torch.zeros(rows, dtype=torch.bool), [f"k{i}" for i in range(rows)],
    )  # fmt: skip
    objective = make(ProSeCo, pick="sample", t_min=0.999999)
    frequencies = drafts(objective, batch)[0][:, 0].bincount(minlength=40) / rows
    prefix = objective.backbone.encode_prefix({"prompt_ids": batch.prefix["prompt_ids"][:1]})
    logits = objective.backbone(prefix, torch.tensor([[SPECIAL.mask]]))[0, 0].double()
    logits[list(BANNED)] = -torch.inf
    p = logits.softmax(-1)
    assert ((frequencies - p).abs() < 4 * (p * (1 - p) / rows).sqrt() + 1e-9).all()


def test_a_model_that_knows_the_answer_corrects_a_clean_text():
    """Its draft is the answer, so the corrector's loss is that of clean input: 0 here, -1 with errors weighing more."""
    batch = batch_with_prompt()
    batch.response = batch.response.clamp(min=5)
    for fill in ("all", "masked"):
        for errors, expected in ((False, {"correct": 0.0}), (True, {"wrong": 0.0, "right": -1.0})):
            objective = make(
                ProSeCo, backbone=lambda: Oracle(batch.response), fill=fill, errors=errors, correct_weight="one"
            )
            terms = means(objective, batch)
            assert {name: terms[name].item() for name in expected} == pytest.approx(expected, abs=1e-6)
            hits, tries = objective._counts["draft_error_rate"].tolist()
            assert (hits, tries) == (0, int(batch.editable.sum()))


def test_the_draft_error_rate_is_the_share_of_wrong_tokens():
    batch = batch_with_prompt()
    objective = make(ProSeCo)
    wrong = drafts(objective, batch)[0] != batch.response
    hits, tries = objective._counts["draft_error_rate"].tolist()
    assert hits == int((wrong & batch.editable).sum()) > 0
    assert tries == int(batch.editable.sum())
    assert objective._counts["accuracy/mistake"][1] == hits


@pytest.mark.parametrize(("name", "options"), [("proseco", {"begin": 3}), ("edits", {"begin": 0.75})])
def test_the_second_pass_begins_when_told(name, options):
    batch = batch_with_prompt()
    objective = make({"proseco": ProSeCo, "edits": EditNoiseObjective}[name], **options)
    passes = []
    for step in range(5):
        trainer = SimpleNamespace(global_step=step, max_steps=4)
        objective._trainer = trainer  # Lightning's own attribute; a trainer cannot be stopped between two steps
        passes.append(len(means(objective, batch)))  # one term a pass
    assert passes == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("filler_loss", [True, False])
def test_edit_noise_equals_the_written_out_loop(filler_loss):
    batch = batch_with_prompt(padding=0)
    batch.response[:, 6], batch.response[:, 7:] = SPECIAL.eot, SPECIAL.eos
    objective = make(EditNoiseObjective, rate=0.5, optim=Optim(lr=1e-3, filler_loss=filler_loss))
    (state,) = objective.corrupt(batch)
    edited = drafts(objective, batch)[0]
    assert not (edited == SPECIAL.mask).any()
    first = token_losses(objective.backbone, batch, state)
    second = token_losses(objective.backbone, batch, Corrupted(edited, state.target, state.kind, state.rate))
    expected, size = 0.0, 12 if filler_loss else 7
    for row in range(len(batch)):
        masked = sum(v for i, v in enumerate(first[row][:size]) if state.tokens[row, i] == SPECIAL.mask)
        expected += (masked / state.rate[row].item() + sum(second[row][:size])) / size / len(batch)
    objective._counts.clear()
    assert total(objective, batch).item() == pytest.approx(expected, rel=1e-4)
    tries = [objective._counts[f"accuracy/{kind}"][1].item() for kind in ("clean", "syntax")]
    assert sum(tries) == size * len(batch)


def test_complementary_masks_hide_every_token_once():
    batch = batch_with_prompt(12)
    objective = make(ComplementaryMasks, t_min=0.001)
    one, other = objective.corrupt(batch)
    assert torch.equal(one.where(Kind.MASK) ^ other.where(Kind.MASK), batch.editable)
    assert torch.equal(one.where(Kind.MASK), make(MaskPrediction, t_min=0.001).corrupt(batch)[0].where(Kind.MASK))
    torch.testing.assert_close(one.rate + other.rate, torch.ones(12))
    visible = other.where(Kind.CLEAN)
    assert torch.equal(other.tokens[visible], batch.response[visible])


def test_antithetic_levels_are_spread_evenly_over_the_views_and_uniform_in_each():
    batch = batch_with_prompt(500, padding=0)
    objective = make(MaskPrediction, t_min=0.2, optim=Optim(lr=1e-3, views=4, antithetic=True))
    levels = torch.stack([state.rate for state in objective.corrupt(batch)])  # (4, B)
    assert levels.min() >= 0.2 and levels.max() < 1
    gaps = levels.sort(0).values.diff(dim=0)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.8 / 4), atol=1e-6, rtol=0)
    for level in (levels - 0.2) / 0.8:
        assert level.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 500) ** 0.5)


def test_replacements_hit_the_right_tokens_of_a_draft_only():
    batch = batch_with_prompt(40)
    plain, noisy = (
        drafts(make(ProSeCo, fill="masked"), batch)[0],
        drafts(make(ProSeCo, fill="masked", rate=0.5), batch)[0],
    )
    wrong = (plain != batch.response) & batch.editable
    assert torch.equal(noisy[wrong], plain[wrong])
    right = ~wrong & batch.editable
    share = (noisy[right] != plain[right]).float().mean().item()
    assert share == pytest.approx(0.5, abs=4 * (0.25 / int(right.sum())) ** 0.5)
    ordinary = set(Replace(special=SPECIAL, rate=0.5).ordinary.tolist())
    assert set(noisy[right & (noisy != plain)].tolist()) <= ordinary
