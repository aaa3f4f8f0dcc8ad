"""The golden models in bfloat16, as released models run, against their own float32 logits.

A bound is a part of the logits' own spread, so that it holds for any golden set. The reference programs lose 2 % of it
on average.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.collate import image_inputs
from src.models.llada_v import LLaDAV

FOLDER = Path(os.environ["GOLDEN_LLADA_V"])  # tests/conftest.py has seen to it
NAMES = sorted(path.stem.removeprefix("vision_") for path in FOLDER.glob("vision_*.npz"))
BOUND = 0.04


@torch.no_grad()
def logits_of(model: LLaDAV, inputs: dict[str, Tensor], response: Tensor) -> Tensor:
    return model(model.encode_prefix(inputs), response)


def lost(found: Tensor, expected: Tensor) -> float:
    """Mean error as a part of the standard deviation."""
    return float((found.float() - expected).abs().mean() / expected.std())


@pytest.fixture(scope="module")
def batch(golden, golden_model) -> tuple[dict[str, Tensor], Tensor]:
    """All images with their prompts, and a response of other ids for each."""
    cases, ids = [golden.npz(f"vision_{name}") for name in NAMES], []
    for case in cases:
        mark = golden.meta["image_placeholder"]
        ids.append([golden_model.image_id if token == mark else token for token in case["prompt_ids"].tolist()])
    longest = max(map(len, ids))
    mask = torch.tensor([[place < len(row) for place in range(longest)] for row in ids])
    prompt = {"prompt_ids": torch.tensor([row + [0] * (longest - len(row)) for row in ids]), "prompt_mask": mask}
    images = image_inputs([[Image.fromarray(case["image"])] for case in cases], golden_model.layout)
    return {**prompt, **images}, torch.arange(len(ids) * 32).reshape(-1, 32) % golden.meta["mask_id"]


@pytest.fixture(scope="module")
def exact(golden_model, batch) -> Tensor:
    return logits_of(golden_model, *batch)


def test_the_multimodal_model_in_bfloat16(golden_model, batch, exact):
    found = logits_of(copy.deepcopy(golden_model).bfloat16(), *batch)
    assert found.dtype == torch.bfloat16
    assert 0.001 < lost(found, exact) < BOUND


def test_the_multimodal_model_under_autocast(golden_model, batch, exact):
    """Weights stay in float32, as in training."""
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_of(golden_model, *batch)
    assert found.dtype == torch.bfloat16
    assert 0.001 < lost(found, exact) < BOUND


def test_the_text_model_in_bfloat16(golden, golden_text_model):
    prompt = torch.from_numpy(golden.npz("text_samplers")["prompt"])[:1]  # the row without padding
    inputs, response = {"prompt_ids": prompt}, torch.arange(64)[None] % golden_text_model.vocab_size
    found = logits_of(copy.deepcopy(golden_text_model).bfloat16(), inputs, response)
    assert found.dtype == torch.bfloat16
    assert 0.001 < lost(found, logits_of(golden_text_model, inputs, response)) < BOUND
