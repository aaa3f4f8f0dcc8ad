"""The verb `generate` on a LLaDA-V folder as it was released: what comes out is what the released sampler writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from src.generate import main
from src.io.shards import write_shards
from src.text.tokenizer import Codec
from testing.files import read_jsonl

UNLIKE = {"stop_ids", "suffix_ids", "fake_ans"}  # what the command line cannot say: they are ids


@pytest.fixture
def photos(golden, tmp_path) -> Path:
    """The images of the golden set, of different shapes, as files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for case in golden.folder.glob("vision_*.npz"):
        name = case.stem.removeprefix("vision_")
        Image.fromarray(golden.npz(case.stem)["image"]).save(folder / f"{name}.png")
    return folder


def names(photos: Path) -> list[str]:
    return sorted(path.name for path in photos.iterdir())


@pytest.fixture
def command(golden, golden_folder_v, tmp_path):
    """Runs the verb on images and returns the lines of its output."""
    case = golden.json("prompt_case")

    def run(images: Path, *settings: str, out: str = "out.jsonl", prompt: str = case["question"]) -> list[dict]:
        main(
            ["conf=generate", "model=llada_v", f"model.path={golden_folder_v}", "model.dtype=float32",
             f"model.vision={json.dumps(golden.meta['vision_config'])}", f"images={images}", f"out={tmp_path / out}",
             *([f"prompt={prompt}"] if prompt else []), f"system={case['system']}", *settings]
        )  # fmt: skip
        return read_jsonl(tmp_path / out)

    return run


def released(case: dict, path: Path) -> Path:
    """The sampler of a golden case as a file."""
    reviser = {"share": case.get("revise_topk", 1.0), "begin": case.get("revise_start", 1.0)}
    settings = {
        "target": "src.samplers.sampler.Sampler",
        "length": case["gen_length"],
        "steps": case["steps"],
        "blocks": case["gen_length"] // case["block_length"],
        "cfg_scale": case.get("cfg_scale", 0.0),
    }
    if case["revise"]:
        settings["reviser"] = {"target": "src.samplers.rediff.OverwriteAll", **reviser}
    path.write_text(yaml.safe_dump({"sampler": settings}))
    return path


def final_ids(trace: Path) -> dict[str, list[int]]:
    lines = read_jsonl(trace)
    return {line["key"]: line["steps"][-1]["tokens"] for line in lines}


def test_captions_are_those_of_the_released_sampler(golden, golden_folder_v, command, photos, tmp_path) -> None:
    """One image of the batch is that of the golden case; the others, of other shapes, must not change it."""
    cases = {name: case for name, case in golden.json("sampler_traces").items() if not UNLIKE & case.keys()}
    shortest = sorted(cases, key=lambda name: cases[name]["steps_run"])[:10]
    assert {cases[name]["revise"] for name in shortest} == {True, False}
    codec = Codec.load(golden_folder_v)
    for name in shortest:
        case = cases[name]
        file = released(case, tmp_path / "sampler.yaml")
        lines = command(photos, "join=upstream", f"sampler={file}", "trace=true", out=f"{name}.jsonl")
        assert [line["key"] for line in lines] == names(photos)
        key = f"{case['image']}.png"
        assert final_ids(tmp_path / f"{name}.trace.jsonl")[key] == case["final"], name
        assert {line["key"]: line["text"] for line in lines}[key] == codec.decode(case["final"])


def test_files_and_shards_of_any_shape_one_by_one_or_together(golden, command, photos, tmp_path) -> None:
    """Which batch an image comes in, and from where, does not change its caption; a damaged one is left out."""
    whole = names(photos)
    (photos / "a-broken.png").write_bytes((photos / whole[0]).read_bytes()[:100])
    settings = ("sampler=refine", "length=16", "tokens_per_step=4")
    together = command(photos, *settings, out="together.jsonl")
    assert [line["key"] for line in together] == whole
    alone = command(photos, *settings, "batch_size=1", out="alone.jsonl")
    assert alone == together
    assert len({line["text"] for line in together}) == len(whole)

    samples = [
        {"__key__": path.stem, "json": {"prompt": golden.json("prompt_case")["question"]}, "png": path.read_bytes()}
        for path in sorted(photos.glob("*.png"))
    ]
    write_shards(tmp_path / "data", samples, prefix="test", per_shard=2, kind="captions", tokenizer=None)
    sharded = command(tmp_path / "data", *settings, prompt="", out="sharded.jsonl")
    assert [f"{line['key']}.png" for line in sharded] == whole
    assert [line["text"] for line in sharded] == [line["text"] for line in together]


def test_a_stopped_run_goes_on_without_repeating(command, photos, tmp_path, capsys) -> None:
    settings = ("length=16", "steps=4", "batch_size=2")
    whole = command(photos, *settings)
    first = (tmp_path / "out.jsonl").read_text().split("\n")[0]  # a prompt may hold what `str.splitlines` breaks at
    (tmp_path / "out.jsonl").write_text(f"{first}\n")
    (photos / whole[0]["key"]).write_bytes(b"this would fail now")  # its caption is there
    (photos / "a-broken.png").write_bytes(b"this does fail")
    capsys.readouterr()
    assert command(photos, *settings) == whole
    said = capsys.readouterr()
    assert said.out == "".join(f"{line['key']}: {line['text']}\n" for line in whole[1:])
    assert f"{len(whole) - 1} captions written" in said.err and "1 already there" in said.err
    assert "1 images could not be read: a-broken.png" in said.err


def test_the_system_text_and_the_join_reach_the_model(command, photos) -> None:
    settings = ("length=16", "steps=4")
    texts = {
        name: [line["text"] for line in command(photos, *settings, *more, out=f"{name}.jsonl")]
        for name, more in {"as told": [], "joined": ["join=upstream"], "none": ["system=''"]}.items()
    }
    assert texts["as told"] != texts["joined"] and texts["as told"] != texts["none"]


def test_output_of_other_prompts_is_not_mixed(command, photos, capsys) -> None:
    command(photos, "length=16", "steps=4")
    with pytest.raises(SystemExit):
        command(photos, "length=16", "steps=4", "join=upstream", "prompt_format=llada_v")
    assert "made with another prompt_format, join" in capsys.readouterr().err
