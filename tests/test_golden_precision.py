"""The golden models in bfloat16, as released models run, against their own float32 logits.

How much bfloat16 loses depends on the depth and the weights of a model, so the bound comes from the model itself: its
float32 weights rounded to bfloat16, computed in float32, with the output of every leaf module rounded. That is bfloat16
but for what happens between the leaf modules. A decoder block has nine of these and rounds about as often between them
(rotary embedding, attention scores and weights, their sum, gate, residual sums), so twice its error is the limit for
any golden set. Measured on models of 2 to 12 layers in the decoder and 2 to 8 in the tower: 1.03 to 1.81 times.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from datamodules.collate import image_inputs
from src.models.llada_v import LLaDAV

FOLDER = Path(os.environ["GOLDEN_LLADA_V"])  # tests/conftest.py has seen to it
NAMES = sorted(path.stem.removeprefix("vision_") for path in FOLDER.glob("vision_*.npz"))
FACTOR = 2.0  # of the error of the rounded model


@torch.no_grad()
def logits_of(model: LLaDAV, inputs: dict[str, Tensor], response: Tensor) -> Tensor:
    return model(model.encode_prefix(inputs), response)


def lost(found: Tensor, expected: Tensor) -> float:
    """Mean error as a part of the standard deviation."""
    return float((found.float() - expected).abs().mean() / expected.std())


def rounded(model: LLaDAV) -> LLaDAV:
    """The model in float32 with its weights, and what every leaf module returns, rounded to bfloat16."""

    def round_output(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return output.bfloat16().float() if output.is_floating_point() else output

    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(round_output)
    return model


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


@pytest.fixture(scope="module")
def bound(golden_model, batch, exact) -> float:
    return FACTOR * lost(logits_of(rounded(golden_model), *batch), exact)


def test_the_multimodal_model_in_bfloat16(golden_model, batch, exact, bound):
    found = logits_of(copy.deepcopy(golden_model).bfloat16(), *batch)
    assert found.dtype == torch.bfloat16
    assert 0.001 < lost(found, exact) < bound


def test_the_multimodal_model_under_autocast(golden_model, batch, exact, bound):
    """Weights stay in float32, as in training."""
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_of(golden_model, *batch)
    assert found.dtype == torch.bfloat16
    assert 0.001 < lost(found, exact) < bound


def test_the_text_model_in_bfloat16(golden, golden_text_model):
    prompt = torch.from_numpy(golden.npz("text_samplers")["prompt"])[:1]  # the row without padding
    inputs, response = {"prompt_ids": prompt}, torch.arange(64)[None] % golden_text_model.vocab_size
    found = logits_of(copy.deepcopy(golden_text_model).bfloat16(), inputs, response)
    assert found.dtype == torch.bfloat16
    exact = logits_of(golden_text_model, inputs, response)
    assert 0.001 < lost(found, exact) < FACTOR * lost(logits_of(rounded(golden_text_model), inputs, response), exact)
