"""Captions of another model, corrected: what changes, what is said of it, and what is left as it is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.generate import main
from src.generation.captioner import Captioner
from src.generation.correct import find_corrections
from src.text.captions import read_captions
from src.text.tokenizer import Codec
from testing.files import read_jsonl

BASE = Path(__file__).resolve().parents[1] / "assets" / "base"
PROMPT = "Describe the picture."
CAPTIONS = {
    "a.png": "A large red ring is in the upper left. A small blue cross is in the lower right.",
    "b": "Two objects are on a green background.",
    "more/c.jpg": " The  picture shows\u00a0a cross. ",
    "d.png": "A ring and " * 40 + "a cross.",
}


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(BASE)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("A red ring.", "A red ring.", []),
        ("A red ring.", "A blue ring.", [("red", "blue", 2)]),
        ("A small red ring is red.", "A small red ring is blue.", [("red", "blue", 20)]),
        ("A red ring, a ring.", "A blue cross, a ring.", [("red ring", "blue cross", 2)]),
        ("A red ring. A cross.", "A blue ring. A ring.", [("red", "blue", 2), ("cross", "ring", 14)]),
        ("A red ring. A cross.", "A red ring.", [("A cross.", "", 12)]),
        ("A red ring.", "A red ring. A cross.", [("", "A cross.", 11)]),
    ],
)
def test_corrections_are_whole_words_at_their_place(codec, before, after, expected):
    old, new = (codec.encode(text)[0] for text in (before, after))
    places = range(max(len(old), len(new)))
    confidence = {place: 0.9 + place / 1000 for place in places}
    corrections = find_corrections(codec, old, new, confidence)
    assert [(c["org"], c["target"], c["start_char"]) for c in corrections] == expected
    differ = [place for place in places if old[place : place + 1] != new[place : place + 1]]
    assert sum(c["tokens"] for c in corrections) == len(differ)
    if corrections:
        assert corrections[0]["confidence"] == round(0.9 + differ[0] / 1000, 4)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("A red ring, a red bin.", "A rod ring, a red bag.", [("red", "rod", 2), ("bin", "bag", 18)]),
        ("A red ring.", "A ted ring.", [("red", "ted", 2)]),
        (
            "A ring in \u00e9t\u00e9.",
            "A ring in \u00e8t\u00e9.",
            [("A ring in \u00e9t\u00e9.", "A ring in \u00e8t\u00e9.", 0)],
        ),
    ],
)
def test_words_of_several_tokens_and_characters_of_several(before, after, expected):
    """With bytes as tokens; where these share a character, the whole text is one correction."""
    codec = Codec.train(["A"], vocab_size=263, alphabet="bytes")
    old, new = (codec.encode(text)[0] for text in (before, after))
    assert len(old) == len(new) == len(before.encode())
    corrections = find_corrections(codec, old, new, dict.fromkeys(range(len(old)), 0.9))
    assert [(c["org"], c["target"], c["start_char"]) for c in corrections] == expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.png", "more/c.jpg", "d.png", "without.png"]):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    lines = [
        json.dumps({"image": name, "caption": text}) for name, text in [*CAPTIONS.items(), ("gone.png", "A ring.")]
    ]
    (tmp_path / "theirs.jsonl").write_text("\n".join(lines))
    return tmp_path


def correct(folder: Path, *settings: str) -> list[dict]:
    given = {
        "captions": folder / "theirs.jsonl",
        "images": folder / "photos",
        "out": folder / "out.jsonl",
        "prompt": PROMPT,
    }
    given |= dict(setting.split("=", 1) for setting in settings)
    main(["conf=correct", f"model.path={BASE}", *(f"{name}={value}" for name, value in given.items())])
    return read_jsonl(folder / "out.jsonl")


def test_only_what_the_model_is_sure_of_changes(folder, codec, capsys, caplog):
    lines = {line["key"]: line for line in correct(folder, "threshold=0.4", "batch_size=3")}
    printed = capsys.readouterr()
    assert list(lines) == ["a.png", "b.png", "d.png", "more/c.jpg"]
    assert {key: line["left"] for key, line in lines.items() if line["left"]} == {
        "d.png": "too_long",
        "more/c.jpg": "unknown_characters",
    }
    captioner = Captioner.load(BASE, device="cpu")
    sampler = captioner.sampler("edit_quality")
    sampler = replace(sampler, reviser=replace(sampler.reviser, tau=0.4))
    num_changed = 0
    for key, name in (("a.png", "a.png"), ("b.png", "b")):
        alone = captioner.revise(folder / "photos" / key, CAPTIONS[name], prompt=PROMPT, sampler=sampler)
        assert lines[key]["text"] == alone.text.strip() != lines[key]["before"] == CAPTIONS[name]
        for correction in lines[key]["corrections"]:
            start, org = correction["start_char"], correction["org"]
            assert CAPTIONS[name][start : start + len(org)] == org
            assert correction["confidence"] > 0.4
            num_changed += correction["tokens"]
    for key, name in (("d.png", "d.png"), ("more/c.jpg", "more/c.jpg")):
        assert lines[key]["text"] == CAPTIONS[name].strip() and lines[key]["corrections"] == []
    num_tokens = sum(len(codec.encode(line["before"])[0]) for line in lines.values())
    assert f"| all | 4 | {num_tokens} |\n| changed | 2 | {num_changed} |\n" in printed.out
    assert "| left as they are: too_long | 1 | |" in printed.out and "a.png: " in printed.out
    assert "generate: 4/4 text" in printed.err and "1 caption has no image, such as that of gone.png" in caplog.text
    # the file is one of captions, and the same command adds nothing to it
    assert read_captions(folder / "out.jsonl").texts == {key: line["text"] for key, line in lines.items()}
    assert list(lines.values()) == correct(folder, "threshold=0.4", "batch_size=3")
    assert f"| changed | 2 | {num_changed} |" in capsys.readouterr().out


def test_a_whole_name_comes_before_a_part_of_another(folder):
    Image.open(folder / "photos" / "a.png").save(folder / "photos" / "more" / "a.png")
    texts = {"a.png": "A red ring.", "more/a.png": "A blue ring.", "b": "Half a \ud83d character."}
    (folder / "theirs.json").write_text(json.dumps(texts))
    lines = correct(folder, "threshold=1", f"captions={folder / 'theirs.json'}")
    assert {line["key"]: line["text"] for line in lines} == {
        "a.png": "A red ring.",
        "b.png": "Half a ? character.",
        "more/a.png": "A blue ring.",
    }


def test_a_threshold_of_one_changes_nothing(folder, capsys):
    lines = correct(folder, "threshold=1")
    assert [line["text"] for line in lines] == [line["before"] for line in lines]
    assert "| changed | 0 | 0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["images=null"], "captions=.* are of images"),
        (["caption=A ring."], "captions=.* are of images: give images, and no other caption"),
        (["sampler=refine"], "threshold=0.9: sampler=refine has none; use edit_quality"),
        (["sampler=plain", "threshold=null"], "a sampler without post steps rewrites no finished text"),
        (["num=0"], "num must be at least 1, got 0"),
        (["threshold=1.5"], "tau must be within 0..1, got 1.5"),
        (["captions=nowhere.jsonl"], "captions: nowhere.jsonl cannot be read"),
        (["images=PHOTOS/without.png"], "is about other images: it has 'a.png', images has 'without.png'"),
    ],
)
def test_mistakes(folder, capsys, settings, message):
    with pytest.raises(SystemExit):
        correct(folder, *(setting.replace("PHOTOS", str(folder / "photos")) for setting in settings))
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


def test_other_captions_need_another_file(folder, capsys):
    correct(folder, "threshold=1", "num=1")
    (folder / "theirs.jsonl").write_text('{"key": "a", "text": "A ring."}')
    with pytest.raises(SystemExit):
        correct(folder, "threshold=1", "num=1")
    assert "was made with other settings (captions: " in capsys.readouterr().err
