"""The baselines of the benchmarks do what they claim to."""

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.sampler import by_hand, ours, released
from src.types import SpecialIds
from tests.backbones import small_model

FOLDER = Path(os.environ["GOLDEN_LLADA_V"])
TRACES = json.loads((FOLDER / "sampler_traces.json").read_text())
PLAIN = [name for name in TRACES if name.startswith(("b1_", "b2_", "uneven_"))]


@pytest.mark.parametrize("name", PLAIN)
def test_the_released_loop_is_that_of_the_golden_traces(golden, golden_model, name):
    case, meta = TRACES[name], golden.meta
    special = SpecialIds(
        meta["mask_id"], meta["eos_id"], meta["eot_id"], tuple(meta["suppressed_ids"]), vocab_size=meta["vocab_size"]
    )
    embeds = torch.from_numpy(golden.npz(f"vision_{case['image']}")["inputs_embeds"])[None]
    length = case["gen_length"]
    options = {"blocks": length // case["block_length"], "revise": case["revise"]}
    states = released(golden_model, embeds, special, length=length, steps=case["steps"], **options)
    assert torch.stack(states).tolist() == golden.npz("sampler_traces")[f"{name}/x"][:, :length].tolist()


def test_the_ideal_loop_writes_what_the_sampler_writes():
    model = small_model(24)
    special = SpecialIds(mask=0, eos=1, eot=2, banned=(0, 1, 2), vocab_size=24)
    with torch.no_grad():
        prefix = model.encode_prefix({"prompt_ids": torch.tensor([[4, 9, 7, 5]])})
    expected = by_hand(model, prefix, special, length=16, steps=4)
    assert torch.equal(ours(model, prefix, special, length=16, steps=4), expected)
