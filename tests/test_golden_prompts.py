"""Prompts token by token as the reference programs of LLaDA-V make them (tests/golden/README.md)."""

from __future__ import annotations

import numpy as np
import pytest

from src.text.prompt_format import IMAGE
from src.text.tokenizer import BOS, EOT, HEADER_END, HEADER_START, Codec


@pytest.fixture(scope="module")
def codec(golden_folder_v) -> Codec:
    """From a folder with nothing but tokenizer.json and the config.json of the original."""
    return Codec.load(golden_folder_v)


def read(codec: Codec, ids: list[int]) -> str:
    """The text of ids, special tokens and image marks included."""
    runs = [[]]
    for i in ids:
        if i == codec.image_id:
            runs.append([])
        else:
            runs[-1].append(i)
    return IMAGE.join(codec.tokenizer.decode(run) for run in runs)


def messages(codec: Codec, ids: list[int]) -> list[tuple[str, str]]:
    """(role, content) of each message of a conversation."""
    parts = read(codec, ids).removeprefix(BOS).split(EOT)[:-1]
    return [tuple(part.removeprefix(HEADER_START).split(f"{HEADER_END}\n\n", 1)) for part in parts]  # type: ignore[misc]


def test_ids_of_the_inference_prompt(codec, golden) -> None:
    case = golden.json("prompt_case")
    upstream = codec.with_format(system=case["system"], join="upstream")
    assert upstream.prompt_ids(case["question"]) == case["inference_ids"]
    bare = case["question"].replace(f"{IMAGE}\n", "")
    assert upstream.prompt_ids(bare) == upstream.prompt_ids(f"{bare} \n") == case["inference_ids"]  # it trims
    for image in golden.folder.glob("vision_*.npz"):
        assert upstream.prompt_ids(bare) == golden.npz(image.stem)["prompt_ids"].tolist()


def test_what_is_kept_is_what_the_released_inference_loses(codec, golden) -> None:
    case = golden.json("prompt_case")
    ids = codec.with_format(system=case["system"]).prompt_ids(case["question"])
    assert read(codec, ids) == case["inference_prompt"]
    behind = ids.index(codec.image_id) + 1
    assert ids[:behind] + ids[behind + 1 :] == case["inference_ids"]
    assert codec.tokenizer.decode([ids[behind]]) == "\n"


def test_two_images(codec, golden) -> None:
    expected = golden.npz("splice_two_images")["prompt_ids"].tolist()
    system, (_, content) = messages(codec, [*expected[: len(expected) - expected[::-1].index(codec.eot_id)]])
    first, *others = content.split(IMAGE)
    lost = f"{first}{IMAGE}" + IMAGE.join(f"\n{text}" for text in others)  # any token would do
    upstream = codec.with_format(system=system[1], join="upstream")
    assert upstream.prompt_ids(lost, images=len(others)) == expected


@pytest.mark.parametrize("name", ["preprocess_cases", "train_conversation_mask", "train_conversation_off"])
def test_prompt_and_response_are_the_ids_of_training(name, codec, golden) -> None:
    """Each assistant message is the response to a prompt that holds the messages before it.

    The labels of the original are also on the header of that message and on the special tokens of the prompt; here
    only the response is trained, text and end of turn. So labels are compared there, and elsewhere seen to be more.
    """
    cases = golden.json(name) if name == "preprocess_cases" else [golden.npz(name)]
    for case in cases:
        ids, labels = (np.asarray(case[field]).flatten().tolist() for field in ("input_ids", "labels"))
        (_, system), *said = messages(codec, ids)
        keep, turns, end = codec.with_format(system=system), [], 0
        for (_, question), (_, answer) in zip(said[::2], said[1::2], strict=True):
            prompt = keep.prompt_ids(question, images=ids.count(codec.image_id), turns=turns)
            response = [*keep.encode(answer)[0], keep.eot_id]
            end = len(prompt) + len(response)
            assert prompt + response == ids[:end]
            assert labels[len(prompt) : end] == response
            assert set(labels[: len(prompt)]) > {-100}
            turns.append((question, answer))
        assert set(ids[end:]) <= {codec.eos_id}  # filler, if any
        assert len(turns) == len(said) // 2 > 0
        if name == "preprocess_cases":  # what was read back from the ids is what the case was made of
            assert (system, [text for _, text in said]) == (case["system"], [text for _, text in case["messages"]])


def test_a_saved_copy_makes_the_same_prompts(codec, golden, tmp_path) -> None:
    case = golden.json("prompt_case")
    codec.with_format(system=case["system"], join="upstream").save(tmp_path)
    copy = Codec.load(tmp_path)
    assert copy.prompt_ids(case["question"]) == case["inference_ids"]
    assert (copy.fingerprint, copy.special) == (codec.fingerprint, codec.special)
