"""Small files in the formats of the papers' benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from src.metrics.caparena import BASELINES

NUM = 5


def write_images(folder: Path, stems: list[str]) -> None:
    folder.mkdir(parents=True)
    for number, stem in enumerate(stems):
        Image.new("RGB", (40, 30), (40 * number, 90, 200)).save(folder / f"{stem}.jpg")


def write_capmas(folder: Path, num: int = NUM) -> Path:
    """Images in a subfolder, as an archive may have them; one question has blanks before its options."""
    stems = [f"aar_test_0460{n}" for n in range(num)]
    write_images(folder / "images" / "deep", stems)
    (folder / "COVERAGE_TEST_VQA").mkdir()
    lines = []
    for number, stem in enumerate(stems):
        lines.append({"dataset": "IIW-400", "image": stem, "caption": f"A reference of picture {number}."})
        asked = {"questions": ["Which?\n  A) one\n  B) two", "What?\nA) red\nB) blue"], "answers": ["A", "B"]}
        (folder / "COVERAGE_TEST_VQA" / f"{stem}.json").write_text(json.dumps(asked))
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def captions_file(path: Path, num: int = NUM, **changed: str) -> Path:
    """Captions of `write_capmas`, of four words each. first: another caption of the first image"""
    texts = {f"aar_test_0460{n}.jpg": f"A picture, number {n}." for n in range(num)}
    if "first" in changed:
        texts["aar_test_04600.jpg"] = changed["first"]
    lines = [{"key": key, "text": text, "prompt": "Describe it.", "length": 64} for key, text in texts.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_caparena(folder: Path, num: int = NUM) -> Path:
    stems = [f"test_0000{n}" for n in range(num)]
    write_images(folder / "images", stems)
    records = {}
    for number, stem in enumerate(stems):
        captions = {"human": f"Picture {number}.", **{name: f"{name} on {number}." for name in BASELINES}}
        records[f"{stem}.jpg"] = {"captions": captions, "ref_model": BASELINES[number % 3]}
    (folder / "caparena_auto_600.json").write_text(json.dumps(records))
    return folder
