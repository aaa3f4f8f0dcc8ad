"""Small sets of photographs: every split gets an image, and what is said about the others helps."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from src.cli.help import docstring, help_text
from src.io.shards import read_shard
from src.preparation.counts import Counts
from src.preparation.photos import Photos
from src.preparation.sources.source import read_entries
from src.preparation.splits import hashed_share, split_of
from src.prepare import __doc__ as prepare_help
from src.prepare import main
from testing.files import read_jsonl

SPLITS = ("train", "val", "test")
FILE = "image-{}.png"


def dataset(folder: Path, records: list[dict], **settings: Any) -> Photos:
    """Photos of one colour each, by the names in the records; those with `bad` in their names are no images."""
    folder.mkdir(exist_ok=True)
    for record in records:
        file = folder / record["image"]
        if "bad" in file.name:
            file.write_text("no image")
        else:
            Image.new("RGB", (4, 4), "red").save(file)
    (folder / "a.json").write_text(json.dumps(records))
    plain = {
        "image_size": 4,
        "vocab_size": 300,
        "response_length": 16,
        "prompt": "What?",
        "encoding": "png",
        **settings,
    }
    return Photos(out=str(folder / "out"), images=str(folder), annotations=str(folder / "a.json"), **plain)


def split_keys(folder: Path) -> dict[str, list[str]]:
    """The names of the images in each split, one for each sample."""
    keys: dict[str, list[str]] = {}
    for split in SPLITS:
        tars = sorted((folder / "out" / split).glob("*.tar"))
        keys[split] = [s["__key__"].rpartition("-")[0] for tar in tars for s in read_shard(tar)]
    return keys


def names_with(wanted: str, count: int, form: str = FILE) -> list[str]:
    """File names whose hash means the split `wanted`."""
    names = (form.format(number) for number in range(10**6))
    fitting = (name for name in names if split_of(hashed_share(Path(name).stem, 0)) == wanted)
    return [next(fitting) for _ in range(count)]


def record(name: str, **more: Any) -> dict:
    return {"image": name, "caption": "A cat.", **more}


def stem(name: str) -> str:
    return Path(name).stem


@pytest.mark.parametrize(
    ("train", "val", "test", "moved"),
    [(3, 0, 0, "vt"), (4, 0, 0, "vt"), (40, 0, 0, "vt"), (4, 0, 2, "v"), (2, 2, 2, "")],
)
def test_the_largest_split_fills_empty_ones(train: int, val: int, test: int, moved: str, tmp_path: Path) -> None:
    """The images nearest to the border of the hashes go, val first; where no split is empty, all stay."""
    names = {split: names_with(split, count) for split, count in zip(SPLITS, (train, val, test), strict=True)}
    dataset(tmp_path, [record(name) for split in SPLITS for name in names[split]]).run()
    expected = {}
    for split in SPLITS:
        expected[split] = sorted(map(stem, names[split]), key=lambda name: hashed_share(name, 0))
    for letter in moved:
        expected["val" if letter == "v" else "test"].append(expected["train"].pop())
    keys = split_keys(tmp_path)
    assert {split: set(keys[split]) for split in SPLITS} == {split: set(expected[split]) for split in SPLITS}


def test_what_cannot_be_used_fills_no_split(tmp_path: Path) -> None:
    names, bad, long = names_with("train", 4), names_with("val", 2, "bad-{}.png"), names_with("test", 1, "long-{}.png")
    records = [*map(record, names), *map(record, bad), {"image": long[0], "caption": "cat, " * 90}]
    index = dataset(tmp_path, records).run()
    assert [len(keys) for keys in split_keys(tmp_path).values()] == [2, 1, 1]
    (example,) = index["examples"]["val"].items()
    assert example[0] == "undecodable_image" and example[1] in bad
    assert index["examples"]["test"]["captions too long"].startswith(f"{long[0]}: ")


def test_splits_in_the_records_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = names_with("train", 5)
    with caplog.at_level(logging.WARNING):
        dataset(tmp_path, [record(name, split="train" if name != names[0] else "val") for name in names]).run()
    assert [len(keys) for keys in split_keys(tmp_path).values()] == [4, 1, 0]
    assert "no sample is in test; add" in caplog.text


def test_an_empty_train_is_one_error_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset(tmp_path, [record(name, split="test") for name in names_with("train", 3)])
    out = tmp_path / "out"
    files = [f"prepare.images={tmp_path}", f"prepare.annotations={tmp_path / 'a.json'}"]
    with pytest.raises(SystemExit) as stop:
        main(["conf=photos", f"prepare.out={out}", *files])
    assert (stop.value.code, out.exists()) == (2, False)
    assert "error: nothing could be used for train" in capsys.readouterr().err


HELP_RECORDS = [line.strip() for line in (prepare_help or "").splitlines() if line.startswith("    {")]


def test_every_record_becomes_something_and_the_numbers_say_what(tmp_path: Path) -> None:
    """Records of every fate, in two sources."""
    for number in range(12):
        Image.new("RGB", (9, 9), (number * 20, 0, 0)).save(tmp_path / f"a{number}.png")
    (tmp_path / "a10.png").write_bytes(b"no image")
    own = {"caption": "A cat.", "split": "train"}
    rows = [{"image": f"a{n}.png", **own} for n in range(12)]  # kept; a10 is undecodable, in the split
    rows += [{"image": "a0.png", **own, "caption": "A dog."}, {"image": "a1.png", **own}]  # merged
    rows += [{"image": "a2.png", **own, "split": "val"}]  # image_in_two_splits
    rows += [{"image": "a3.png", **own, "split": "best"}]  # unknown_split
    rows += [{"image": "none.png", **own}, {"image": "a4.png", "caption": ""}, {"caption": "x"}, {"image": "a4.png"}]
    turns = [{"from": who, "value": "A cat."} for who in ("human", "gpt", "human", "gpt")]
    rows += [{"image": "a5.png", "conversations": turns, "split": "train"}]  # kept, without its second turn
    rows += [{"image": "a6.png", "prompt": "Why?", **own, "captions": ["A cat.", "cat " * 99]}]  # one is too long
    rows += [{"image": "a7.png", "prompt": "Why?", **own, "caption": "cat " * 99}]  # kept, and left out of the split
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"image": f"a{n}.png", **own}) + "\n" for n in range(9)))
    sources = {"a": {"annotations": str(tmp_path / "a.jsonl"), "images": str(tmp_path)}}
    sources["b"] = {"annotations": str(tmp_path / "b.jsonl"), "images": str(tmp_path), "max": 4}
    settings: dict[str, Any] = {"image_size": 4, "vocab_size": 300, "response_length": 16, "prompt": "What?"}
    Photos(out=str(tmp_path / "out"), sources=sources, max_images=18, **settings).run()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    listed = Counter((line["part"], line["reason"]) for line in read_jsonl(tmp_path / "out" / "rejects.jsonl"))
    assert listed.pop(("records", "over_max")) >= 1
    parts = {("records", "later_turns"): 1, ("train", "captions too long"): 2}  # of what is kept, or is listed itself
    left_out = {("train", "no_usable_caption"): 1, ("train", "undecodable_image"): 1}
    rejected = {"image_in_two_splits": 1, "unknown_split": 1, "missing_image": 1, "empty_caption": 1}
    rejected |= {"unknown_format": 2, "not_a_record": 1}
    assert listed == {**parts, **left_out, **{("records", reason): number for reason, number in rejected.items()}}
    assert manifest["records"] == {
        "read": len(rows) + 1 + 9, "rejected": sum(rejected.values()), "merged": 2, "over_max": 5 + 1, "kept": 18,
    }  # fmt: skip
    split = manifest["splits"]["train"]
    assert (split["samples"], split["left_out"]) == (16, 2)
    assert [source["samples"] for source in manifest["sources"]] == [13, 3]


@pytest.mark.parametrize("line", HELP_RECORDS)
def test_the_formats_in_the_help_are_read(line: str, tmp_path: Path) -> None:
    assert line in help_text("src.prepare", docstring("src.prepare"))
    shape, _ = json.JSONDecoder().raw_decode(line.replace("[...]", "[]"))
    (tmp_path / "a.json").write_text(json.dumps(shape))
    if "annotations" in shape:
        shape = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "A cat."}]}
        (tmp_path / "a.json").write_text(json.dumps(shape))
    first = next(iter(read_entries(tmp_path / "a.json", Counts())))
    assert first.image == "a.jpg"
    assert first.captions[0].text in ("A cat.", "A")
