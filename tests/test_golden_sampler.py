"""Every step of the released samplers, replayed by ours (tests/golden/README.md, `sampler_traces` and `text_samplers`).

`generate_with_embeds` of LLaDA-V and ReDiff: the golden prompt embeddings are the prefix, so that nothing here depends
on the image path. Ids that the released code suppresses are `banned`, and its stop string is our eot. The set was made
with whole heads, so that `vocab_size` is here the head's: ids behind the tokenizer's last have a share of a confidence.

Where it stops early its last step may have fewer masks left than it is scheduled to unmask. It then also "unmasks"
places without any confidence, and these fall on the prefix, whose embeddings it so overwrites; as the text is finished
with that step, nothing comes of it. Our sampler unmasks the masks that are left: the traces are equal all the same.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from src.samplers.proseco import Corrector
from src.samplers.rediff import OverwriteAll
from src.samplers.sampler import Sampler
from src.samplers.unmask import Threshold
from src.types import Prefix, Sampled, SpecialIds
from tests.backbones import Recording

FOLDER = Path(os.environ["GOLDEN_LLADA_V"])  # tests/conftest.py has seen to it
TRACES = json.loads((FOLDER / "sampler_traces.json").read_text())
TEXTS = json.loads((FOLDER / "text_samplers.json").read_text())
LLADA = [name for name in TEXTS if name.startswith("llada/")]
PROSECO = [name for name in TEXTS if name.startswith("proseco/")]


def sampler_of(case: dict) -> Sampler:
    revise = OverwriteAll(share=case.get("revise_topk") or 1.0, begin=case.get("revise_start", 1.0))
    return Sampler(
        length=case["gen_length"],
        steps=case["steps"],
        blocks=case["gen_length"] // case["block_length"],
        reviser=revise if case.get("revise") else None,
        early_stop="eot" if "stop_ids" in case else False,
        cfg_scale=case.get("cfg_scale", 0.0),
    )


def ids_of(meta: dict, case: dict) -> SpecialIds:
    (stop,) = case.get("stop_ids", [meta["eot_id"]])
    banned = tuple(meta["suppressed_ids"])
    return SpecialIds(meta["mask_id"], meta["eos_id"], stop, banned, vocab_size=meta["vocab_size"])


def generate(golden, model, case: dict) -> Sampled:
    meta, length = golden.meta, case["gen_length"]
    prefix = Prefix(torch.from_numpy(golden.npz(f"vision_{case['image']}")["inputs_embeds"])[None])
    given = case.get("fake_ans", [])
    start = torch.tensor([given + [meta["mask_id"]] * (length - len(given))])
    suffix = torch.tensor(case["suffix_ids"]) if "suffix_ids" in case else None
    special, sampler = ids_of(meta, case), sampler_of(case)
    return sampler(model, prefix, special=special, keys=["a"], seed=0, start=start, suffix=suffix, trace=True)


def calls_of(case: dict) -> int:
    """Forward calls of one step and row. The released code counts a guided step, a batch twice as large, as one."""
    return 2 if case.get("cfg_scale") else 1


@pytest.fixture(scope="module")
def traces(golden):
    return golden.npz("sampler_traces")


@pytest.fixture(scope="module")
def sampled(golden, golden_model):
    """What our sampler makes of each case."""
    return {name: generate(golden, golden_model, case) for name, case in TRACES.items()}


@pytest.mark.parametrize("name", TRACES)
def test_each_step_is_that_of_the_released_code(sampled, traces, name):
    case, length = TRACES[name], TRACES[name]["gen_length"]
    (steps,) = sampled[name].traces
    tokens, unmasked, confidence = (traces[f"{name}/{part}"][:, :length] for part in ("x", "transfer", "conf"))
    assert [step.tokens for step in steps] == tokens.tolist()
    assert [step.unmasked for step in steps] == [row.nonzero()[0].tolist() for row in unmasked]
    for step, row in zip(steps, confidence, strict=True):
        assert step.confidence == pytest.approx(row[step.unmasked].tolist(), rel=1e-3)
    assert len(steps) == case["steps_run"]
    assert [step.forwards for step in steps] == [calls_of(case) * (i + 1) for i in range(len(steps))]
    for step, row in zip(steps, traces[f"{name}/x0"], strict=True):  # each written token is the best of its step
        assert [step.tokens[place] for place in step.unmasked] == row[step.unmasked].tolist()
        assert [new for _, _, new in step.rewritten] == [int(row[place]) for place, _, _ in step.rewritten]
    assert any(step.rewritten for step in steps) == case["revise"]


@pytest.mark.parametrize("name", TRACES)
def test_the_text_is_the_released_one_up_to_its_end(golden, sampled, traces, name):
    case = TRACES[name]
    special, suffix = ids_of(golden.meta, case), case.get("suffix_ids", [])
    assert case["final"] == traces[f"{name}/final"].tolist()
    text = case["final"][: len(case["final"]) - len(suffix)]
    if not case.get("stop_ids") and special.eot in text:  # nothing stops the released code there
        text = text[: text.index(special.eot)]
    expected = [*text, special.eot, *[special.eos] * case["gen_length"]][: case["gen_length"]]
    assert sampled[name].ids.tolist() == [expected]


@pytest.mark.parametrize("name", LLADA)
def test_each_step_is_that_of_the_text_sampler(golden, golden_text_model, name):
    arrays, case = golden.npz("text_samplers"), TEXTS[name]
    states = arrays[f"{name}/states"]  # (steps, B, P + L)
    prompts, masks = (arrays[part][: states.shape[1]] for part in ("prompt", "attention_mask"))
    special = SpecialIds(
        mask=int(arrays["mask_id"]), eos=int(arrays["eos_id"]), eot=int(arrays["eos_id"]), banned=(),
        vocab_size=golden_text_model.vocab_size,
    )  # fmt: skip
    prefix = golden_text_model.encode_prefix(padded_right(prompts, masks, special.mask))
    keys = [str(row) for row in range(len(prompts))]
    sampled = sampler_of(case)(golden_text_model, prefix, special=special, keys=keys, seed=0, trace=True)
    for row, steps in enumerate(sampled.traces):
        assert [step.tokens for step in steps] == states[:, row, prompts.shape[1] :].tolist()
    assert sampled.forwards.tolist() == [calls_of(case) * case["calls"]] * len(prompts)


def padded_right(prompts, masks, mask_id: int) -> dict[str, torch.Tensor]:
    """Inputs of our backbones from prompts (B, P) that are padded on the left: what is real goes first."""
    rows = [prompt[mask > 0].tolist() for prompt, mask in zip(prompts, masks, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [mask_id] * (width - len(row)) for row in rows])
    return {"prompt_ids": ids, "prompt_mask": torch.tensor([[i < len(row) for i in range(width)] for row in rows])}


@pytest.mark.parametrize("name", PROSECO)
def test_each_call_and_step_is_that_of_proseco(golden, golden_text_model, name):
    """Predictor and corrector calls in order, the response after each step, and the counts of calls.

    The released code asks again for a whole batch until all its rows agree with themselves. Ours leaves the rows out
    that do; they would not have changed.
    """
    arrays, case = golden.npz("text_samplers"), TEXTS[name]
    states, calls = arrays[f"{name}/states"], arrays[f"{name}/calls"]  # (steps, B, L), (calls, B, P + L)
    rows = states.shape[1]
    prompts = arrays.get(f"{name}/prompt", arrays["prompt"][:rows])
    eos = case.get("eos_id", int(arrays["eos_id"]))
    size = golden_text_model.vocab_size
    special = SpecialIds(mask=int(arrays["mask_id"]), eos=eos, eot=size, banned=(), vocab_size=size)
    every, passes = case["apply_corrector_every_n_steps"], case["max_corrector_steps_per_loop"]
    sampler = Sampler(
        length=case["gen_length"],
        steps=case["steps"],
        blocks=case["gen_length"] // case["block_length"],
        reviser=Corrector(every=every, passes=passes),
        unmask=Threshold(case["threshold"], scheduled=False) if "threshold" in case else None,
        early_stop="block" if case["early_eos_stopping"] else False,
    )
    recording = Recording(golden_text_model)
    prefix = golden_text_model.encode_prefix({"prompt_ids": torch.from_numpy(prompts)})
    keys = [str(row) for row in range(rows)]
    sampled = sampler(recording, prefix, special=special, keys=keys, seed=0, trace=True)
    for row, steps in enumerate(sampled.traces):
        assert [step.tokens for step in steps] == states[:, row].tolist()
    assert sampled.ids.tolist() == arrays[f"{name}/final"][:, prompts.shape[1] :].tolist()
    if rows == 1:
        assert [ids for _, ids in recording.texts] == calls[:, 0, prompts.shape[1] :].tolist()
    # a call of a batch counts for the rows that still change
    num_calls = sum(row == 0 for row, _ in recording.texts)
    assert num_calls == case["total_nfe"] >= int(sampled.forwards.max())
