"""A sampler's `compile`, and the blocks of the model under torch.compile: the same tokens are written."""

from __future__ import annotations

from functools import partial
from random import Random

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from src.models.hf.folder import from_pretrained
from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.samplers.unmask import Bernoulli
from src.scenes.graph import draw_scene
from src.scenes.render import render
from src.text.tokenizer import Codec

BASE = "assets/base"
GREEDY = {"reviser": OverwriteAll(), "post_steps": 2, "eos_last": True, "eos_behind_eot": True, "early_stop": True}
RANDOM = {"unmask": Bernoulli(), "temperature": 1.0, "top_p": 0.9, "check_every": 4}


def inputs_of(codec, rows):
    rng = Random(0)
    pictures = [np.array(render(draw_scene(rng), rng)) for _ in range(rows)]
    prompt = torch.tensor([codec.prompt_ids("Describe the picture.")] * rows)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)[:, None]
    sizes = {"num_tiles": torch.ones(rows, 1, dtype=torch.int64), "image_sizes": torch.full((rows, 1, 2), 48)}
    return {"prompt_ids": prompt, "pixel_values": pixels, **sizes}


@torch.no_grad()
def captions(model, codec, settings, rows=64):
    prefix = model.encode_prefix(inputs_of(codec, rows))
    sampler = Sampler(length=64, tokens_per_step=8, **settings)
    if sampler.compile:
        model.compile_blocks()
    sampled = sampler(model, prefix, special=codec.special, keys=[str(row) for row in range(rows)], seed=0)
    return sampled.ids, sampled.forwards


@pytest.mark.parametrize("settings", [GREEDY, pytest.param(RANDOM, marks=pytest.mark.slow)], ids=["greedy", "random"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_writes_the_same(backend, settings, monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    model, codec = from_pretrained(BASE).eval(), Codec.load(BASE)
    expected, calls = captions(model, codec, settings)
    # a graph break, or more versions of a function than are kept, is an error here; users get a warning
    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True, backend=backend))
    ids, compiled_calls = captions(model, codec, {**settings, "compile": True})
    assert torch.equal(ids, expected)
    assert torch.equal(calls, compiled_calls)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 4  # the blocks, and both parts of a step
    captions(model, codec, {**settings, "compile": True})
    assert counters["stats"]["unique_graphs"] <= graphs + 1  # of a second batch only the blocks on its prefix are new
