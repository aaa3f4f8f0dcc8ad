"""Losses and gradients of the released training code, from its own noise (tests/golden/README.md, `train_*`).

The released code trains template tokens of the prompt as well. So the "response" is here the whole sequence, images
included: kinds label any position, and the decoder takes embeddings. Nothing hides padding from attention, as there.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from src.cli.config import load_config
from src.cli.instantiate import build
from src.diffusion.corruption import Absorb, Chain, Replace, start
from src.diffusion.losses import Term, term_sum
from src.diffusion.noise import Noise
from src.models.hf.formats import LlamaStyle
from src.objectives.base import Setup
from src.objectives.mask import MaskPrediction
from src.objectives.optim import Optim
from src.types import Batch, Corrupted, Kind, Prefix, SpecialIds
from tests.rounding import in_float64, rounded_off
from tests.test_objectives import total

FOLDER = Path(os.environ["GOLDEN_LLADA_V"])  # tests/conftest.py has seen to it
RESULTS = json.loads((FOLDER / "train_results.json").read_text())
EXPECTED = json.loads((FOLDER / "train_expected_fp64.json").read_text())
RELEASED = [name for name, result in RESULTS.items() if result["variant"] == "B" and name != "conversation_mask"]


@pytest.fixture(scope="module")
def golden_wide(golden_model) -> nn.Module:
    return in_float64(golden_model)


class WholeSequence(nn.Module):
    """The model over whole sequences: a backbone without a prefix, with images at their places in the sequence."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def encode_prefix(self, prefix: dict) -> Prefix:
        """(B, L, D): packed images at the places of images, zero elsewhere."""
        where, width = prefix["is_image"], self.model.config.hidden_size
        images = torch.cat([self._packed(name) for name in prefix["images"]])
        return Prefix(images.new_zeros(*where.shape, width).masked_scatter(where[..., None], images))

    def forward(self, prefix: Prefix, tokens: torch.Tensor, *, attend=None, positions: torch.Tensor) -> torch.Tensor:
        decoder = self.model.model
        text = decoder.embed_tokens(tokens.clamp(min=0)) * (tokens >= 0)[..., None]  # below 0: an image, or padding
        embeds = text + prefix.embeds
        hidden = decoder(embeds, Prefix(embeds[:, :0]), None)
        return self.model.lm_head(hidden[positions])

    def _packed(self, array) -> torch.Tensor:
        image = Image.fromarray(array)
        tiles = torch.from_numpy(self.model.layout.tiles(image).copy()).permute(0, 3, 1, 2)[None]
        sizes = {"num_tiles": torch.tensor([[tiles.shape[1]]]), "image_sizes": torch.tensor([[image.size]])}
        mark = torch.tensor([[self.model.image_id]])
        return self.model.encode_prefix({"prompt_ids": mark, "pixel_values": tiles, **sizes}).embeds[0]


class GivenNoise:
    """The uniform numbers of a golden case in the order in which they are asked for; stands in for `Noise`."""

    def __init__(self, case: dict, ordinary: torch.Tensor) -> None:
        self.case, self.ordinary = case, ordinary
        self.numbers = iter([case["mask_uniform"], case["replace_uniform"]])

    def level(self, *, device="cpu") -> torch.Tensor:
        return torch.zeros(len(self.case["t"]))  # below every share

    def uniform(self, where: torch.Tensor) -> torch.Tensor:
        if not torch.equal(where, torch.from_numpy(self.case["labels_full"]) >= 0):
            return (~where).float()  # the choice among spans: there is one
        return torch.from_numpy(next(self.numbers))

    def integers(self, where: torch.Tensor, high: int) -> torch.Tensor:
        """Numbers that make `Replace` draw the golden ids: it skips the original."""
        ids, right = torch.from_numpy(self.case["replacement_ids"]), torch.from_numpy(self.case["labels_full"])
        return torch.where(ids >= 0, ids - (ids > right).long(), 0)


def spread(row: list, place: int, image: list, end: list) -> list:
    """A row of text with an image in place of its mark, and what follows it in the batch."""
    return [*row[:place], *image, *row[place + 1 :], *end]


def load(golden, name: str) -> SimpleNamespace:
    """A case with its sequences laid out: ids (B, L), -1 where an image is, -2 behind a row; the batch; the sets."""
    case, meta = golden.npz(f"train_{name}"), golden.meta
    images = [golden.npz(f"vision_{image}") for image in case["image_names"]]
    length = case["labels_full"].shape[1]
    rows, spans = [], []
    for ids, revise, image in zip(case["input_ids"], case["revise_indices"], images, strict=True):
        count, place = len(image["packed"]), ids.tolist().index(meta["image_placeholder"])
        rows.append(spread(ids.tolist(), place, [-1] * count, [-2] * length)[:length])
        spans.append(spread(revise.tolist(), place, [False] * count, [False] * length)[:length])
    ids, labels = torch.tensor(rows), torch.from_numpy(case["labels_full"])
    span = torch.from_numpy(case["revise_full"])
    batch = Batch(
        prefix={"is_image": ids == -1, "images": [image["image"] for image in images]},  # type: ignore[dict-item]
        response=torch.where(labels >= 0, labels, ids),
        editable=labels >= 0,
        flawed=ids,
        span=span.long(),
        drafted=span.any(1),
        keys=[str(row) for row in range(len(ids))],
    )
    special = SpecialIds(
        mask=meta["mask_id"],
        eos=meta["eos_id"],
        eot=meta["eot_id"],
        banned=tuple(sorted({*meta["special_ids"].values()} - {meta["eos_id"], meta["eot_id"]})),
        vocab_size=meta["tokenizer_len"],
    )
    sets = {key: torch.from_numpy(case[key]) for key in ("masked", "replaced", "replacement_ids", "p_mask")}
    return SimpleNamespace(case=case, batch=batch, special=special, aligned=torch.tensor(spans), **sets)


def golden_state(sample: SimpleNamespace) -> Corrupted:
    """The damage as the golden sets tell it, for every case and variant."""
    tokens = torch.where(sample.masked, sample.special.mask, sample.batch.flawed)
    tokens = torch.where(sample.replaced, sample.replacement_ids, tokens)
    kind = torch.where(sample.batch.editable, int(Kind.CLEAN), int(Kind.FROZEN))
    for where, name in (
        (sample.batch.span > 0, Kind.HALLUCINATION), (sample.replaced, Kind.SYNTAX), (sample.masked, Kind.MASK)
    ):  # fmt: skip
        kind = kind.masked_fill(where, int(name))
    return Corrupted(tokens, sample.batch.response, kind.to(torch.uint8), sample.p_mask)


def objective_of(name: str, sample: SimpleNamespace, model: nn.Module):
    """The objective that the released code trains in this case, as our presets configure it."""
    setup = Setup(backbone=lambda: WholeSequence(model), special=sample.special, optim=Optim(lr=1.0))
    if not RESULTS[name]["revise"]:
        return MaskPrediction(setup)
    preset = "stage1,objective/rediff_released"
    if sample.batch.drafted.all():
        preset = "stage2,objective/rediff_released,objective/rediff_released_stage2"
    settings = ["objective.alone_share=1.0"]
    more = ["model.path=none", "run_dir=none"] if preset.startswith("stage2") else []
    node = load_config([f"conf={preset}", *settings, *more]).objective
    return build(node, setup=setup)


@pytest.mark.parametrize("name", RESULTS)
def test_the_sequences_are_laid_out_as_in_the_released_code(golden, name):
    sample = load(golden, name)
    visible = sample.batch.editable & ~sample.batch.drafted[:, None]
    assert torch.equal(sample.batch.response[visible], sample.batch.flawed[visible])
    counts = RESULTS[name]["counts"]
    assert sample.batch.editable.sum(1).tolist() == counts["valid"]
    expected = EXPECTED[name]["revise_positions_aligned"]
    assert [row.nonzero()[:, 0].tolist() for row in sample.aligned] == expected


def test_the_released_code_trains_the_wrong_places_of_shorter_images(golden):
    """A defect that no checkpoint needs: it shifts all rows by one number. Ours are the intended places."""
    sample = load(golden, "mixed_sizes_revise")
    assert not torch.equal(sample.batch.span > 0, sample.aligned)
    longest = (sample.batch.flawed == -1).sum(1).argmax()
    assert torch.equal(sample.batch.span[longest] > 0, sample.aligned[longest])


@pytest.mark.parametrize("name", RELEASED)
def test_noise_levels_and_damage(golden, golden_model, name):
    """From the same uniform numbers, the same noise levels, masks and replacements."""
    sample = load(golden, name)
    objective = objective_of(name, sample, golden_model)
    t = torch.from_numpy(sample.case["t"])
    assert torch.allclose(objective.t_min + (1 - objective.t_min) * t, sample.p_mask, atol=1e-7)
    replace = Replace(special=sample.special, rate=0.0)
    noise = GivenNoise(sample.case, replace.ordinary)
    state = objective.corruption(sample.batch, start(sample.batch, sample.p_mask), noise)
    untouched = sample.replaced & (sample.replacement_ids == sample.batch.response)  # ours never draws the original
    expected = golden_state(sample)
    misplaced = sample.aligned ^ (sample.batch.span > 0)  # see above: wrong tokens where no span is trained
    compared = sample.batch.editable & ~untouched & ~misplaced
    assert torch.equal(state.tokens[compared], expected.tokens[compared])
    assert torch.equal(state.where(Kind.MASK), sample.masked)
    assert torch.equal(state.where(Kind.SYNTAX), sample.replaced & ~untouched)


@pytest.mark.parametrize("name", RELEASED)
def test_loss_and_gradients(golden, golden_model, golden_wide, name):
    sample = load(golden, name)
    objective = objective_of(name, sample, golden_model)
    state = golden_state(sample)
    released = sample.batch.drafted[:, None]  # such a row trains its spans only
    frozen = released & ~state.where(Kind.HALLUCINATION)
    kind = state.kind.masked_fill(frozen, int(Kind.FROZEN)) if RESULTS[name]["revise"] else state.kind
    if "mistake" in {term.name for term in objective.terms} and bool(sample.batch.drafted.all()):
        kind = kind.masked_fill(kind == int(Kind.HALLUCINATION), int(Kind.MISTAKE))
    state = Corrupted(state.tokens, state.target, kind, state.rate)
    golden_model.zero_grad()
    loss = total(objective, sample.batch, [state])
    lost = rounded_off(losses_of(golden_model, sample, state), losses_of(golden_wide, sample, state))
    allowed = 2 * lost * float((1 / state.rate).mean())  # of a loss that is a mean over samples, each times 1/t
    assert loss.item() == pytest.approx(EXPECTED[name]["code_loss_fp64"], rel=1e-5, abs=allowed)
    assert loss.item() == pytest.approx(RESULTS[name]["loss"], rel=1e-5, abs=allowed)
    check_gradients(golden_model, RESULTS[name]["grad_norms"])
    golden_model.zero_grad()


def check_gradients(model: nn.Module, expected: dict[str, float]) -> None:
    """Norms of all gradients under the original names, where exact arithmetic has one."""
    gradients = {LlamaStyle().theirs(name): p.grad for name, p in model.named_parameters()}
    checked = 0
    for name, norm in expected.items():
        if "vision_tower" in name and name.endswith("k_proj.bias"):
            continue  # zero in exact arithmetic
        grad = gradients[name]
        own = 0.0 if grad is None else grad.norm().item()
        assert own == pytest.approx(norm, rel=1e-3, abs=1e-6), name
        checked += norm > 0
    assert checked > len(expected) / 2


@torch.no_grad()
def losses_of(model: nn.Module, sample: SimpleNamespace, state: Corrupted) -> torch.Tensor:
    """(B, L): cross-entropy of each target, 0 elsewhere."""
    backbone, where = WholeSequence(model), sample.batch.editable
    logits = backbone(backbone.encode_prefix(sample.batch.prefix), state.tokens, positions=where)
    losses = logits.new_zeros(state.tokens.shape)
    losses[where] = nn.functional.cross_entropy(logits, state.target[where], reduction="none")
    return losses


@pytest.mark.parametrize("name", [name for name in RESULTS if name != "conversation_mask"])
def test_terms_of_the_paper(golden, golden_model, golden_wide, name):
    """Each term per sample, 1/t times the mean over its kind; L_refine without 1/t."""
    sample, expected = load(golden, name), EXPECTED[name]
    state = golden_state(sample)
    table = {
        "L_mask": Term("mask", Kind.MASK, "inverse_rate"),
        "L_syntax": Term("syntax", Kind.SYNTAX, "inverse_rate"),
        "L_clean": Term("clean", Kind.CLEAN, "inverse_rate"),
        "L_hallucination": Term("hallucination", Kind.HALLUCINATION, "inverse_rate"),
        "L_refine": Term("refine", Kind.HALLUCINATION, "one"),
    }
    losses = losses_of(golden_model, sample, state)
    lost = rounded_off(losses, losses_of(golden_wide, sample, state))
    for label, term in table.items():
        for row, value in enumerate(expected["paper"][label]["per_sample"]):
            one = slice(row, row + 1)
            part = Corrupted(state.tokens[one], state.target[one], state.kind[one], state.rate[one])
            weight = 1.0 if term.weight == "one" else 1.0 / float(state.rate[row])
            found, allowed = term_sum(term, losses[one], part).item(), max(1e-6, 2 * lost * weight)
            assert found == pytest.approx(value, rel=2e-5, abs=allowed), label


def test_noise_is_what_the_corruptions_ask_of_it():
    """`GivenNoise` answers what `Noise` answers: a guard for the stand-in above."""
    methods = {name for name in dir(GivenNoise) if not name.startswith("_")}
    assert methods <= {name for name in dir(Noise) if not name.startswith("_")}
    assert Chain(Absorb, Replace).steps == (Absorb, Replace)
