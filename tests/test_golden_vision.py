"""The image path against the reference programs (tests/golden/README.md): tiles, features, packing, splice, logits."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.collate import image_inputs
from src.models.llada_v import LLaDAV
from src.types import Prefix
from tests.rounding import in_float64, tolerance

FOLDER = Path(os.environ["GOLDEN_LLADA_V"])  # tests/conftest.py has seen to it
NAMES = sorted(path.stem.removeprefix("vision_") for path in FOLDER.glob("vision_*.npz"))
FEATURES, LOGITS, BATCH = 5e-5, 1e-3, 1e-4  # tolerances in two layers; the first two are those of the golden set


@pytest.fixture(scope="module")
def cases(golden) -> dict[str, dict[str, np.ndarray]]:
    return {name: golden.npz(f"vision_{name}") for name in NAMES}


@pytest.fixture(scope="module")
def wide(golden_model) -> LLaDAV:
    return in_float64(golden_model)


def assert_near(found: Tensor, expected: np.ndarray | Tensor, wide: Tensor, least: float) -> None:
    """Equal but for rounding. `wide`: what was found, in float64."""
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance(least, found, wide))


def image(case: dict[str, np.ndarray]) -> Image.Image:
    return Image.fromarray(case["image"])


def prompt(model: LLaDAV, case: dict[str, np.ndarray], mark: int) -> list[int]:
    """The ids of a case, with the model's own mark where its images go."""
    return [model.image_id if token == mark else token for token in case["prompt_ids"].tolist()]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    mask = torch.tensor([[place < len(row) for place in range(longest)] for row in rows])
    return {"prompt_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]), "prompt_mask": mask}


def with_prefix_attention(model: LLaDAV) -> LLaDAV:
    """The same weights, but the prompt does not see the response."""
    decoder = {**model.config.to_dict(), "attention": "prefix"}
    other = LLaDAV(decoder=decoder, vision=model.vision_config, image_id=model.image_id, tiling=model.tiling)
    other.load_state_dict(model.state_dict())
    return other.eval()


def all_logits(model: LLaDAV, embeds: Tensor) -> Tensor:
    """(L, V): one plain pass over spliced embeddings (1, L, D), as a response without a prefix."""
    return model.lm_head(model.model(embeds, Prefix(embeds[:, :0]), None))[0]


@pytest.mark.parametrize("name", NAMES)
def test_tiles(golden_model, cases, name):
    case, layout = cases[name], golden_model.layout
    assert list(image(case).size) == case["image_wh"].tolist()
    assert list(layout.grid(image(case).size)) == case["grid_wh"].tolist()
    np.testing.assert_array_equal(layout.tiles(image(case)), case["tiles_u8"])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_of_the_tower_and_the_projector(golden_model, wide, cases, name):
    case = cases[name]
    tiles = image_inputs([[image(case)]], golden_model.layout)["pixel_values"][0]
    features = [model.vision.features(tiles) for model in (golden_model, wide)]
    projected = [model.vision.mm_projector(x) for model, x in zip((golden_model, wide), features, strict=True)]
    for key, (found, exact) in (("vision_features", features), ("projected", projected)):
        count = len(case[key])
        assert_near(found[:count], case[key], exact[:count], FEATURES)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_packing(golden_model, wide, cases, name):
    case, layout, side = cases[name], golden_model.layout, golden_model.vision.side
    size = image(case).size
    rows, columns = layout.unpadded(size, side=side)
    unpadded = [rows.stop - rows.start, columns.stop - columns.start]
    assert unpadded == case["unpadded_hw"].tolist()
    assert list(layout.final(size, side=side)) == case["final_hw"].tolist()
    inputs = image_inputs([[image(case)]], layout)
    (tokens,), (exact,) = (model.vision(inputs["pixel_values"][0], [size]) for model in (golden_model, wide))
    assert_near(tokens, case["packed"], exact, FEATURES)
    assert layout.num_tokens(size, side=side) == len(tokens)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_embeddings_and_logits_of_a_prompt(golden, golden_model, wide, cases, name):
    case, model = cases[name], golden_model
    ids = prompt(model, case, golden.meta["image_placeholder"])
    images = image_inputs([[image(case)]], model.layout)
    inputs = {"prompt_ids": torch.tensor([ids]), **images}
    embeds, exact_embeds = model.encode_prefix(inputs).embeds, wide.encode_prefix(inputs).embeds
    assert_near(embeds[0], case["inputs_embeds"], exact_embeds[0], FEATURES)
    rows, expected = torch.from_numpy(case["logits_rows"]), torch.from_numpy(case["logits"])
    exact = all_logits(wide, exact_embeds)[rows]
    assert_near(all_logits(model, embeds)[rows], expected, exact, LOGITS)

    behind = ids.index(model.image_id) + 1  # what follows the image, as a response to it
    prefix = model.encode_prefix({"prompt_ids": torch.tensor([ids[:behind]]), **images})
    logits = model(prefix, torch.tensor([ids[behind:]]))[0]
    start = prefix.embeds.shape[1]
    text = rows >= start
    assert text.any()
    assert_near(logits[rows[text] - start], expected[text], exact[text], LOGITS)


@torch.no_grad()
def test_two_images_in_one_prompt(golden, golden_model, wide, cases):
    case, model = golden.npz("splice_two_images"), golden_model
    ids = prompt(model, case, golden.meta["image_placeholder"])
    images = image_inputs([[image(cases[str(name)]) for name in case["image_names"]]], model.layout)
    inputs = {"prompt_ids": torch.tensor([ids]), **images}
    embeds, exact = model.encode_prefix(inputs).embeds, wide.encode_prefix(inputs).embeds
    assert_near(embeds[0], case["inputs_embeds"], exact[0], FEATURES)
    last = slice(-len(case["logits_last"]), None)
    assert_near(all_logits(model, embeds)[last], case["logits_last"], all_logits(wide, exact)[last], LOGITS)


@pytest.mark.parametrize("attention", ["full", "prefix"])
@torch.no_grad()
def test_a_batch_gives_what_each_row_gives_alone(golden, golden_model, cases, attention):
    """Every image, then a row of two images and one of text only; the tiles go through the tower three at a time."""
    model = golden_model if attention == "full" else with_prefix_attention(golden_model)
    two, mark = golden.npz("splice_two_images"), golden.meta["image_placeholder"]
    prompts = [prompt(model, case, mark) for case in [*cases.values(), two]]
    images = [[image(case)] for case in cases.values()] + [[image(cases[str(name)]) for name in two["image_names"]]]
    prompts.append([token for token in prompts[0] if token != model.image_id][:20])
    responses = torch.arange(len(prompts) * 7).reshape(-1, 7) + 1
    chunk, model.vision.chunk = model.vision.chunk, 3
    try:
        together = model.encode_prefix({**padded(prompts), **image_inputs([*images, []], model.layout)})
    finally:
        model.vision.chunk = chunk
    logits, wide = model(together, responses), in_float64(model)
    assert together.mask is not None
    for row, (ids, own) in enumerate(zip(prompts, [*images, []], strict=True)):
        inputs = image_inputs([own], model.layout) if own else {}
        inputs = {"prompt_ids": torch.tensor([ids]), **inputs}
        alone, exact = model.encode_prefix(inputs), wide.encode_prefix(inputs)
        length = alone.embeds.shape[1]
        assert together.mask[row].tolist() == [place < length for place in range(together.embeds.shape[1])]
        assert_near(together.embeds[row, :length], alone.embeds[0], exact.embeds[0], FEATURES)
        assert not together.embeds[row, length:].any()
        response = responses[row : row + 1]
        assert_near(logits[row], model(alone, response)[0], wide(exact, response)[0], BATCH)
