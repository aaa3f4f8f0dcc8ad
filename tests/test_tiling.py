"""Tiles and token counts of images of any shape: known numbers, painted images, and transformers' LLaVA-OneVision."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from datamodules.collate import image_inputs
from src.cli.config import load_config
from src.cli.instantiate import build, check
from src.io.errors import UserError
from src.models.tiling import AnyRes, Square, anyres, resized
from src.models.tiny import tiny
from src.models.vision import VisionPath
from src.text.tokenizer import Codec
from src.train import OFFERS

RELEASED = anyres(384)  # LLaDA-V: 36 grids, a tower of 27 x 27 features
SIDE = 27
SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real data is not there")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def random_sizes(count: int, least: int, most: int) -> list[tuple[int, int]]:
    rng = random.Random(count)
    return [(rng.randint(least, most), rng.randint(least, most)) for _ in range(count)]


def transposed(layout: AnyRes) -> list[tuple[int, int]]:
    """transformers gives grids as (height, width)."""
    return [(height, width) for width, height in layout.grids]


@pytest.mark.parametrize(
    ("size", "tiles", "tokens"),
    [
        ((384, 384), 2, 1485),
        ((640, 480), 5, 2929),
        ((768, 768), 5, 3699),
        ((1024, 768), 7, 3627),
        ((1920, 1080), 16, 3649),
    ],
)
def test_counts_of_the_released_layout(size: tuple[int, int], tiles: int, tokens: int) -> None:
    assert RELEASED.num_tiles(size) == tiles
    assert RELEASED.num_tokens(size, side=SIDE) == tokens


@pytest.mark.parametrize("layout", [anyres(32), anyres(24, columns=3, rows=2)], ids=["6x6", "3x2"])
def test_tiles_equal_those_of_another_implementation(layout: AnyRes) -> None:
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    side = {"height": layout.size, "width": layout.size}
    other = LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=transposed(layout), **half)
    sizes = [*random_sizes(25, 5, 260), (31, 200), (7, 7), (192, 32), (33, 96), (300, 3)]
    for number, size in enumerate(sizes):
        image = noise(*size, seed=number)
        expected = np.asarray(other(image, return_tensors="np")["pixel_values"][0])
        ours = layout.tiles(image)
        assert ours.dtype == np.uint8
        assert len(ours) == layout.num_tiles(size)
        np.testing.assert_allclose((ours.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5, expected, atol=1e-6)


def test_packed_tokens_equal_those_of_another_implementation() -> None:
    """Features that tell tile, row and column, so that a wrong order shows, with and without shrinking."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    path = VisionPath({**vision, "image_size": 384, "patch_size": 14}, 6, tiling=RELEASED)
    settings = SimpleNamespace(vision_config=path.config, image_grid_pinpoints=transposed(RELEASED))
    pack = partial(LlavaOnevisionModel.pack_image_features, SimpleNamespace(config=settings))
    shrunk = []
    for size in [(384, 384), (1920, 1080), (90, 2000), *random_sizes(12, 64, 2600)]:
        features = torch.randn(RELEASED.num_tiles(size), SIDE * SIDE, 6)
        with torch.no_grad():
            (expected,), _ = pack([features], torch.tensor([size[::-1]]), path.image_newline, "anyres_max_4")
            packed = path.pack(features, size)
        assert len(packed) == RELEASED.num_tokens(size, side=SIDE)
        torch.testing.assert_close(packed, expected)
        rows, columns = RELEASED.unpadded(size, side=SIDE)
        shrunk.append(RELEASED.final(size, side=SIDE) != (rows.stop - rows.start, columns.stop - columns.start))
    assert set(shrunk) == {True, False}


def test_the_grid_keeps_most_pixels_then_wastes_least() -> None:
    """Against a search in whole numbers."""
    for size in random_sizes(200, 3, 300):
        columns, rows = anyres(32, columns=4, rows=5).grid(size)
        best: list[tuple[int, int, int, int]] = []
        for wide in range(1, 5):
            for high in range(1, 6):
                if 32 * wide * size[1] < 32 * high * size[0]:  # the width is what limits
                    fitted = 32 * wide * (32 * wide * size[1] // size[0])
                else:
                    fitted = 32 * high * (32 * high * size[0] // size[1])
                kept = min(fitted, size[0] * size[1])
                best.append((-kept, 1024 * wide * high - kept, wide, high))
        assert min(best)[2:] == (columns, rows)


def photographs() -> list[Image.Image]:
    files = sorted((SHARED / "coco_cc" / "images").glob("*.jpg"))[:12]
    return [Image.open(file).convert("RGB") for file in files]


@pytest.mark.parametrize("kind", ["noise", pytest.param("photographs", marks=needs_real_data)])
def test_the_resize_of_torch_is_within_one_grey_level_of_pillows(kind: str) -> None:
    """Down and up, squashed and not. Two roundings may coincide: a few values in a million are two levels off."""
    images = photographs() if kind == "photographs" else [noise(*size, seed=7) for size in random_sizes(12, 1, 300)]
    sizes = [(384, 384), (768, 576), (48, 48), (37, 211), (300, 20), (1, 9)]
    differences = []
    for image in images:
        for (width, height), array in zip(sizes, resized(image, sizes, "torch"), strict=True):
            expected = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=int)
            assert array.dtype == np.uint8 and array.shape == (height, width, 3)
            differences.append(np.abs(array - expected).ravel())
    all_differences = np.concatenate(differences)
    assert (all_differences > 1).sum() < 3e-5 * len(all_differences) and all_differences.max() <= 2
    assert 0 < (all_differences > 0).mean() < 0.01  # above 0: torch made them


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (2, 1), (3, 2500)])
@pytest.mark.parametrize("resize", ["torch", "pillow"])
def test_thin_images_keep_a_feature_of_each_row_and_train(size: tuple[int, int], resize: str) -> None:
    """Of the released layout (the code of the released model keeps none of 1 x 4000), and of a small one end to end."""
    rows, columns = RELEASED.unpadded(size, side=SIDE)
    assert rows.stop > rows.start and columns.stop > columns.start
    layout = anyres(8, columns=3, rows=3, max_tiles=1)
    assert min(layout.final(size, side=2)) > 0
    codec = Codec.train(["Which?"], vocab_size=80)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    backbone = tiny(codec, decoder=sizes, vision=vision, tiling=layout)
    ids = codec.prompt_ids("Which?", images=1)
    inputs = image_inputs([[noise(*size)]], layout, resize=resize)
    prefix = backbone.encode_prefix({"prompt_ids": torch.tensor([ids]), **inputs})
    height, width = layout.final(size, side=2)
    assert prefix.embeds.shape[1] == len(ids) - 1 + 4 + height * (width + 1)
    logits = backbone(prefix, torch.tensor([[codec.mask_id] * 3]))
    loss = logits.logsumexp(-1).mean()
    loss.backward()
    assert loss.isfinite() and backbone.vision.image_newline.grad.isfinite().all()


def test_pixels_are_normalised_in_float32_before_they_become_bfloat16() -> None:
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    path = VisionPath({**tower, "image_size": 16, "patch_size": 4}, 6).bfloat16()
    inputs = image_inputs([[noise(16, 16)]], Square(16))["pixel_values"]  # every grey level
    assert inputs.dtype == torch.uint8
    seen: list[torch.Tensor] = []
    path.vision_tower.embeddings.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    path.features(inputs[0])
    expected = ((inputs[0].numpy().astype(np.float32) / np.float32(127.5)) - np.float32(1)).astype(np.float32)
    assert torch.equal(seen[0], torch.from_numpy(expected).bfloat16())
    early = inputs[0].bfloat16().div(127.5).sub(1)
    assert not torch.equal(seen[0], early)  # the cast first gives other values


@pytest.mark.parametrize(
    ("tiling", "expected"),
    [
        ("{target: src.models.tiling.AnyRes, size: 8, grids: [[8, 16], [16, 8]]}", AnyRes(8, [(8, 16), (16, 8)])),
        ("{target: src.models.tiling.anyres, size: 384}", RELEASED),
    ],
)
def test_a_training_config_takes_a_tiling(tiling: str, expected: AnyRes) -> None:
    root = Path(__file__).parents[1] / "conf"
    settings = ["conf=mask,model/tiny", f"data.image_size={expected.size}", f"data.tiling={tiling}"]
    config = load_config(settings, root=root)
    check(config, offers=OFFERS)
    assert build(config.data.tiling) == build(config.model.tiling) == expected == AnyRes(**expected.to_dict())
    with pytest.raises(UserError, match=r"data\.tiling\.sizes: .* has no argument 'sizes'"):
        check(load_config([*settings[:2], settings[2].replace("size", "sizes")], root=root), offers=OFFERS)


def test_grids_of_the_released_layout_and_mistakes() -> None:
    assert RELEASED.grids[:7] == (*((384, 384 * n) for n in range(1, 7)), (768, 384))
    assert anyres(8, max_tiles=9).num_tokens((48, 48), side=2) > anyres(8).num_tokens((48, 48), side=2)
    for grids, message in (([(8, 8), (16, 20)], r"grids holds \[16, 20\], .* tiles of 8 pixels"), ([[16]], r"\[16\]")):
        with pytest.raises(ValueError, match=message):
            AnyRes(8, grids)
    for layout in (Square(8), anyres(8)):
        with pytest.raises(ValueError, match="got mode 'RGBA'"):
            layout.tiles(Image.new("RGBA", (9, 9)))
