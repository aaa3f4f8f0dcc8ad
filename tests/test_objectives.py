"""Losses against written-out loops, hand-computed cases and the equivalences between methods."""

from __future__ import annotations

import math
from random import Random

import lightning as L
import pytest
import torch
from torch import nn

from src.diffusion.losses import Term, denominator, term_sum
from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.models.llada_v import LLaDAV
from src.objectives.base import Setup
from src.objectives.mask import MaskPrediction
from src.objectives.optim import Optim
from src.objectives.proseco import ProSeCo
from src.objectives.refine import Refine
from src.objectives.revision import RevisionObjective
from src.objectives.scene_labels import TowerLabels
from src.scenes.graph import BACKGROUNDS, COLOURS, SHAPES, SIZES, draw_scene
from src.types import Batch, Corrupted, Kind, Prefix, SpecialIds
from tests.test_corruption import SPECIAL, make_batch

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
OPTIM = Optim(lr=1e-3, warmup_steps=1, decay=0.0)


def tiny_backbone(**options) -> LLaDAV:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LLaDAV(decoder={"vocab_size": 40, "attention": "prefix", **sizes, **options}, vision=None, init_std=0.2)


def batch_with_prompt(rows: int = 6, *, padding: int = 3) -> Batch:
    batch = make_batch(rows, 12, padding=padding)
    batch.prefix = {"prompt_ids": torch.arange(rows * 3).reshape(rows, 3) % 35 + 5}
    return batch


def token_losses(model: nn.Module, batch: Batch, state: Corrupted) -> list[list[float]]:
    """-log p of every target, one row at a time and without any of our loss code."""
    rows = []
    for row in range(len(batch)):
        length = int(batch.editable[row].sum())
        prefix = model.encode_prefix({"prompt_ids": batch.prefix["prompt_ids"][row : row + 1]})
        logits = model(prefix, state.tokens[row : row + 1, :length])[0]
        log_p = torch.log_softmax(logits.double(), -1)
        rows.append([-log_p[i, batch.response[row, i]].item() for i in range(length)])
    return rows


def brute_force(objective, batch: Batch) -> float:
    """The objective's total as a loop over samples, kinds and positions, from the paper's formulas."""
    (state,) = objective.corrupt(batch)
    losses = token_losses(objective.backbone, batch, state)
    total = 0.0
    for term in objective.terms:
        summed, tokens = 0.0, 0
        for row, values in enumerate(losses):
            picked = [v for i, v in enumerate(values) if state.kind[row, i] == int(term.kind)]
            t = max(state.rate[row].item(), term.floor)
            weight = 1 / t if term.weight == "inverse_rate" else 1.0
            if term.reduce == "kind_mean":
                summed += weight * (sum(picked) / len(picked) if picked else 0.0)
            elif term.reduce == "answer_len":
                summed += weight * sum(picked) / len(values)
            else:
                summed += weight * sum(picked)
                tokens += len(picked)
        total += term.coef * summed / (max(tokens, 1) if term.reduce == "tokens" else len(losses))
    return total


def means(objective, batch: Batch, views: list[Corrupted] | None = None) -> dict[str, torch.Tensor]:
    """Each term of one batch; its gradients are added to those of the parameters."""
    views = views or objective.corrupt(batch)
    totals = objective.denominators([(batch, views)])
    return {name: value / totals[name] for name, value in objective.forward_backward(batch, views, totals).items()}


def total(objective, batch: Batch, views: list[Corrupted] | None = None) -> torch.Tensor:
    return objective.weighted(means(objective, batch, views))


def make(cls, *, backbone=tiny_backbone, special: SpecialIds = SPECIAL, optim: Optim = OPTIM, **options):
    return cls(Setup(backbone=backbone, special=special, optim=optim), **{"t_min": 0.05, **options})


def gradients(objective) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


CASES = {
    "llada": lambda: make(MaskPrediction),
    "mask-tokens": lambda: make(MaskPrediction, weight="one", reduce="tokens"),
    "paper": lambda: make(RevisionObjective, rate=0.3),
    "released": lambda: make(RevisionObjective, rate=0.05, hallucination="alone", floor=0.0),
    "syntax-only": lambda: make(RevisionObjective, rate=0.3, hallucination="none"),
    "hallucination-only": lambda: make(RevisionObjective, rate=0.0),
    "stage2": lambda: make(Refine, rate=0.3, keep=0.5),
    "stage2-released": lambda: make(Refine, rate=0.3, hallucination="alone", mistake_weight="inverse_rate"),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_equals_the_written_out_loop(name):
    objective, batch = CASES[name](), batch_with_prompt()
    batch.drafted[::2] = True
    assert total(objective, batch).item() == pytest.approx(brute_force(objective, batch), rel=1e-4)


def test_filler_without_a_loss_stays_in_the_input():
    """As the written-out loop with a shorter list of positions; the logits still see the masks of the filler."""
    batch = batch_with_prompt(padding=0)
    batch.response[:, 6] = SPECIAL.eot
    batch.response[:, 7:] = SPECIAL.eos
    kept, left_out = (make(MaskPrediction, optim=Optim(lr=1e-3, filler_loss=loss)) for loss in (True, False))
    (before,), (state,) = kept.corrupt(batch), left_out.corrupt(batch)
    assert torch.equal(state.tokens, before.tokens) and (state.tokens[:, 7:] == SPECIAL.mask).any()
    assert torch.equal(state.kind[:, :7], before.kind[:, :7]) and not state.kind[:, 7:].any()
    losses = token_losses(left_out.backbone, batch, state)
    expected = 0.0
    for row, values in enumerate(losses):
        masked = [value for position, value in enumerate(values[:7]) if state.tokens[row, position] == SPECIAL.mask]
        expected += sum(masked) / max(state.rate[row].item(), 0.0) / 7
    assert total(left_out, batch).item() == pytest.approx(expected / len(batch), rel=1e-4)


def test_hand_computed_terms():
    kind = torch.tensor([[2, 2, 1, 0], [2, 1, 1, 1]], dtype=torch.uint8)
    loss = torch.tensor([[1.0, 3.0, 5.0, 9.0], [4.0, 1.0, 2.0, 3.0]])
    state = Corrupted(kind.long(), kind.long(), kind, torch.tensor([0.5, 0.25]))

    def value(**options) -> float:
        term = Term("m", Kind.MASK, **options)
        return (term_sum(term, loss, state) / denominator(term, state)).item()

    assert value(weight="one", reduce="tokens") == pytest.approx((1 + 3 + 4) / 3)
    assert value(weight="one", reduce="kind_mean") == pytest.approx((2 + 4) / 2)
    assert value(weight="inverse_rate", reduce="kind_mean") == pytest.approx((2 / 0.5 + 4 / 0.25) / 2)
    assert value(weight="inverse_rate", reduce="answer_len") == pytest.approx((4 / 3 / 0.5 + 4 / 4 / 0.25) / 2)
    assert value(weight="inverse_rate", reduce="kind_mean", floor=0.4) == pytest.approx((2 / 0.5 + 4 / 0.4) / 2)
    assert int(denominator(Term("m", Kind.CLEAN, reduce="tokens"), state)) == 4


def test_stage_one_without_revision_is_llada():
    """Replacement rate 0, no spans, no clean term and the answer-length reduction: LLaDA SFT (spec equivalence d)."""
    batch = batch_with_prompt()
    llada = make(MaskPrediction)
    plain = make(RevisionObjective, rate=0.0, hallucination="none", clean=0.0, reduce="answer_len", floor=0.0)
    assert total(plain, batch).item() == pytest.approx(total(llada, batch).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["llada", "mask-tokens", "paper", "stage2"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_change_nothing(name, size):
    """Summed micro-batch gradients equal those of one large batch (spec equivalence g)."""
    batch = batch_with_prompt(6, padding=0)
    batch.drafted[::2] = True
    results = []
    for micro in (None, size):
        objective = CASES[name]()
        parts = [(part, objective.corrupt(part)) for part in batch.split(micro or len(batch))]
        totals = objective.denominators(parts)
        for part, views in parts:
            objective.forward_backward(part, views, totals)
        results.append(gradients(objective))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro", [1, 3])
def test_a_real_training_step_does_not_depend_on_the_micro_batch(tmp_path, micro):
    """Two optimizer steps through Lightning, schedule and clipping included, against the same with whole batches."""
    batch = batch_with_prompt(6, padding=0)
    weights, rates = [], []
    for size in (None, micro):
        objective = make(RevisionObjective, rate=0.3)
        objective.optim = Optim(lr=1e-2, warmup_steps=2, decay=0.5, clip_norm=0.1, micro_batch=size)
        trainer = L.Trainer(max_steps=4, accelerator="cpu", **QUIET)
        trainer.fit(objective, torch.utils.data.DataLoader([batch] * 4, batch_size=None))
        weights.append(torch.cat([p.detach().flatten() for p in objective.parameters()]))
        rates.append(objective.lr_schedulers().get_last_lr()[0])
    start = torch.cat([p.detach().flatten() for p in make(RevisionObjective).parameters()])
    assert (weights[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-5)
    assert rates == [0.0, 0.0]  # four steps done: warm-up 2, decay over the last two


def test_losses_that_are_not_finite_are_skipped_and_then_stop_the_training():
    batch = batch_with_prompt(4, padding=0)
    objective = make(MaskPrediction)
    objective.backbone.lm_head.weight.data[0, 0] = math.nan
    trainer = L.Trainer(max_steps=1, accelerator="cpu", **QUIET)
    before = objective.backbone.model.norm.weight.clone()
    with pytest.raises(UserError, match=r"not finite after step 0 \(samples .*\), 4 times in a row"):
        trainer.fit(objective, torch.utils.data.DataLoader([batch], batch_size=None))
    assert torch.equal(before, objective.backbone.model.norm.weight)
    assert objective.num_skipped == 4


class Flawed(MaskPrediction):
    """Gets a gradient that is not finite from some batches."""

    wrong = (1, 2, 4)

    def training_step(self, batch, batch_idx):
        self.broken = batch_idx in self.wrong
        super().training_step(batch, batch_idx)

    def weighted(self, values):
        return super().weighted(values) * (math.inf if self.broken else 1)


def test_a_skipped_step_changes_nothing_and_is_counted():
    batches = [batch_with_prompt(4, padding=0) for _ in range(6)]
    for number, batch in enumerate(batches):
        batch.passes = [number] * len(batch)  # other noise

    def trained(objective, batches):
        trainer = L.Trainer(max_steps=3, accelerator="cpu", **QUIET)
        trainer.fit(objective, torch.utils.data.DataLoader(batches, batch_size=None))
        return objective, trainer

    skipping, trainer = trained(make(Flawed), batches)
    without, _ = trained(make(MaskPrediction), [batch for n, batch in enumerate(batches) if n not in Flawed.wrong])
    assert trainer.callback_metrics["train/skipped"] == skipping.num_skipped == 3
    for one, other in zip(skipping.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_second_pass_cannot_divide_by_positions_that_are_not_known_before():
    with pytest.raises(UserError, match="reduce=tokens cannot be used by a second pass"):
        make(ProSeCo, reduce="tokens")


def test_strata_spread_the_levels_of_consecutive_samples_over_ranks_and_batches():
    """Each of eight consecutive samples of the stream gets a level in its own eighth of [t_min, 1)."""
    objective, batch = make(MaskPrediction, t_min=0.2, optim=Optim(lr=1e-3, strata=8)), batch_with_prompt(4, padding=0)
    levels = []
    for start in (16, 20):  # two batches, or the batches of two ranks
        batch.keys, batch.order = [f"k{start + row}" for row in range(4)], list(range(start, start + 4))
        levels.append(objective.corrupt(batch)[0].rate)
    eighths = ((torch.cat(levels) - 0.2) / 0.8 * 8).long()
    assert eighths.tolist() == list(range(8))
    drawn_alone = [Noise([f"k{n}"], seed=0).level() for n in range(16, 24)]
    inside = (torch.cat(levels) - 0.2) / 0.8 * 8 - eighths
    assert torch.allclose(inside, torch.cat(drawn_alone), atol=1e-5)  # and its place in the eighth is its own


def test_noise_levels_are_uniform_between_both_ends():
    """Each is that of the whole range, shrunk to [0.2, 0.6)."""
    batch = batch_with_prompt(64, padding=0)
    (state,) = make(MaskPrediction, t_min=0.2, t_max=0.6).corrupt(batch)
    expected = 0.2 + 0.4 * Noise(batch.keys, seed=0, draw=0).level()
    assert torch.allclose(state.rate, expected, atol=1e-6) and 0.2 <= state.rate.min() < state.rate.max() < 0.6
    for t_min, t_max in ((0.6, 0.2), (0.2, 1.1), (-0.1, 0.5)):
        with pytest.raises(UserError, match=f"got t_min={t_min} and t_max={t_max}"):
            make(MaskPrediction, t_min=t_min, t_max=t_max)


def test_released_stage_two_divides_by_a_rate_that_hid_nothing():
    """The gap between paper and code: the same spans, but divided by the row's t."""
    batch = batch_with_prompt(4, padding=0)
    batch.drafted[:] = True
    state = make(Refine).corrupt(batch)[0]
    losses = token_losses(make(Refine).backbone, batch, state)
    means = [sum(v for i, v in enumerate(row) if batch.span[r, i]) / 4 for r, row in enumerate(losses)]
    paper, released = make(Refine), make(Refine, mistake_weight="inverse_rate", floor=0.0)
    assert total(paper, batch).item() == pytest.approx(sum(means) / 4, rel=1e-4)
    weighted = sum(m / t for m, t in zip(means, state.rate.tolist(), strict=True)) / 4
    assert total(released, batch).item() == pytest.approx(weighted, rel=1e-4)


class Oracle(nn.Module):
    """A backbone that knows the answer: its logits put nearly everything on the true token."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer, self.scale = answer, nn.Parameter(torch.tensor(50.0))

    def encode_prefix(self, prefix):
        return Prefix(prefix["prompt_ids"][..., None].float())

    def forward(self, prefix, tokens, *, attend=None, positions=None):
        logits = self.scale * nn.functional.one_hot(self.answer, 40).float()
        return logits if positions is None else logits[positions]


@pytest.mark.parametrize("cls", [MaskPrediction, RevisionObjective, Refine])
def test_a_model_that_knows_the_answer_has_no_loss(cls):
    batch = batch_with_prompt()
    objective = make(cls, backbone=lambda: Oracle(batch.response))
    assert total(objective, batch).item() < 1e-12


def test_the_schedule_warms_up_holds_and_decays():
    options = Optim(lr=1.0, warmup_steps=10, decay=0.2)
    assert options.factor(4, 100) == pytest.approx(0.5)
    assert options.factor(50, 100) == 1.0
    assert options.factor(90, 100) == pytest.approx(0.5)
    cosine = Optim(lr=1.0, warmup_steps=10)
    assert cosine.factor(55, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))


def test_labels_of_the_tower_equal_the_written_out_loop():
    """One square tile a scene; each of its nine places is seen by one patch."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 12, "patch_size": 4}
    backbone = lambda: LLaDAV(decoder={**sizes, "vocab_size": 40}, vision=vision)  # noqa: E731
    objective = TowerLabels(Setup(backbone=backbone, special=SPECIAL, optim=OPTIM))
    objective.log = lambda *_, **__: None
    batch = make_batch(3, 4)
    scenes = [draw_scene(Random(row), objects=(2, 4)) for row in range(3)]
    batch.records = [{"scene": scene.to_dict()} for scene in scenes]
    tiles = torch.randint(0, 256, (3, 1, 3, 12, 12), dtype=torch.uint8)
    batch.prefix = {"pixel_values": tiles}
    loss = means(objective, batch)["labels"]
    summed = {"shape": [], "colour": [], "size": [], "background": []}
    for row, scene in enumerate(scenes):
        logits = objective.heads(objective.backbone.vision.features(tiles[row]))[0]  # (9, classes)
        classes = [len(SHAPES) + 1, len(COLOURS), len(SIZES), len(BACKGROUNDS)]
        heads = dict(zip(summed, logits.split(classes, -1), strict=True))
        at = {item.cell: item for item in scene.objects}
        for place in range(9):
            item = at.get((place // 3, place % 3))
            labels = {"shape": SHAPES.index(item.shape) if item else len(SHAPES)}
            if item:
                labels |= {"colour": COLOURS.index(item.colour), "size": SIZES.index(item.size)}
            for name, label in labels.items():
                summed[name].append(-heads[name][place].log_softmax(-1)[label].item())
        mean = heads["background"].mean(0).log_softmax(-1)
        summed["background"].append(-mean[BACKGROUNDS.index(scene.background)].item())
    expected = sum(sum(values) / len(values) for values in summed.values())
    assert loss.item() == pytest.approx(expected, rel=1e-4)
