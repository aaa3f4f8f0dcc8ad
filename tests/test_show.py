"""`python -m src.prepare show=PATH`: what it counts and names, and the page that it writes."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from src.io.shards import read_shard, write_shards
from src.preparation.photos import Photos
from src.prepare import main
from src.text.tokenizer import Codec

SETTINGS: dict[str, Any] = {"image_size": 32, "response_length": 200, "prompt": "What is there?"}
NUM = 40


class Page(HTMLParser):
    """The images, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[bytes] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "img":
            self.images.append(base64.b64decode(dict(attrs)["src"].removeprefix("data:image/jpeg;base64,")))
        elif tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in {*self._open}:
            self.texts.setdefault(tag, []).append(data)


def prepare(folder: Path, rows: list[dict]) -> Path:
    (folder / "a.json").write_text(json.dumps([{"split": "train", **row} for row in rows]))
    Photos(out=str(folder / "out"), images=str(folder), annotations=str(folder / "a.json"), **SETTINGS).run()
    return folder / "out"


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, dict[str, tuple[int, str]]]:
    """What was printed, and the findings: name -> (count, example)."""
    capsys.readouterr()
    main(list(argv))
    text = capsys.readouterr().out
    lines = re.findall(r"^ +([\d,]+) +[\d.]+%  (.*), such as (.*)$", text, re.M)
    return text, {name: (int(count), example) for count, name, example in lines}


@pytest.fixture
def rows(tmp_path: Path) -> list[dict]:
    """Photographs that nothing is wrong with."""
    for number in range(NUM):
        noise(number).save(tmp_path / f"p{number:02d}.png")
    return [{"image": f"p{n:02d}.png", "caption": f"A picture of {n} things. All are grey."} for n in range(NUM)]


def test_what_is_right_is_not_named_and_the_page_shows_it(rows, tmp_path, capsys) -> None:
    true, false = "A <red> fox sits & waits.", "A <red> cat sits & waits."
    rows[0] = {"image": "p00.png", "original_caption": true, "changed_caption": false, "problem": "What < is it?"}
    rows[0] |= {"solution_original": "fox", "solution_target": "cat"}
    out = prepare(tmp_path, rows)
    codec = Codec.load(out / "tokenizer")
    text, findings = shown(capsys, f"show={out}")
    assert not findings and "looks wrong, of 40 samples looked at\n  nothing\n" in text
    sums = " ".join(line for line in text.splitlines() if "=" in line)
    assert sums == "40 records = 0 rejected + 0 over max + 0 merged + 40 kept"
    for part in ("image_size 32", f"{NUM}  written", "hallucinated spans: ", "contact.html"):
        assert part in text
    lengths = [
        len(codec.encode(s["json"]["captions"][0]["text"])[0]) for s in read_shard(out / "train/train-000000.tar")
    ]
    (row,) = (line.split() for line in text.splitlines() if line.startswith("train ") and "KB" in line)
    assert row[:3] == ["train", "40", "1"] and row[5:7] == ["40", f"{np.mean(lengths):.2f}".rstrip("0")]
    assert [int(cell) for cell in row[7:]] == [
        *np.percentile(lengths, [5, 50, 95, 99], method="inverted_cdf"), max(lengths)
    ]  # fmt: skip
    page = Page((out / "contact.html").read_text())
    assert (
        len(page.images) == 24 == len({Image.open(io.BytesIO(data)).resize((8, 8)).tobytes() for data in page.images})
    )
    first = Page((out / "contact.html").read_bytes().decode())
    shown(capsys, f"show={out}", "seed=1")
    assert Page((out / "contact.html").read_text()).texts["small"] != first.texts["small"]
    for seed in range(9):  # the sample with a false word comes up
        shown(capsys, f"show={out / 'train'}", f"seed={seed}")
        page = Page((out / "train" / "contact.html").read_text())
        has_span = "cat" in page.texts.get("del", ())
        assert has_span == ("marked: " in page.texts["p"])
        if has_span:
            assert "fox" in page.texts["ins"] and "What < is it?" in page.texts["b"]
            assert "A <red> cat fox sits & waits." in "".join(page.texts["p"])
            return
    pytest.fail("it never came up")


def test_what_looks_wrong_is_counted_with_an_example(rows, tmp_path, capsys) -> None:
    for row in rows[:9]:
        row["caption"] = "A photograph."
    rows[10]["caption"] = "I'm sorry, but I can\u2019t assist with that."
    rows[11]["caption"] = "The message is empty."
    rows[12]["caption"] = "A sign says <|eot_id|> here."
    rows[13]["question"] = "What <|mdm_mask|> is it?"
    rows[14]["caption"] = (
        "Two dogs run over a wide green field in the sun. Behind them a man in a red coat walks with a"
    )
    rows[15]["caption"] = (
        "a dog and a cat and a dog and a cat and a dog and a cat and a dog and a cat and a dog and a cat"
    )
    rows[30]["caption"] = "".join(f"word{n} " for n in range(28))  # of 190 tokens, near the response length
    rows[16]["caption"] = "A caf\ufffd."
    noise(17).save(tmp_path / "p18.png")  # as p17
    Image.new("RGB", (40, 40), (7, 7, 7)).save(tmp_path / "p20.png")
    noise(21).save(tmp_path / "copy.png")
    rows.append({"image": "copy.png", "caption": "A copy of it.", "split": "val"})
    out = prepare(tmp_path, rows)
    _, findings = shown(capsys, f"show={out}")
    counts = {name: count for name, (count, _) in findings.items()}
    assert counts == {
        'one caption on 9 samples: "A photograph."': 9, "refusal of a labelling model": 2,
        "special token in a caption": 1, "special token in a prompt": 1, "caption that is cut off": 2,
        "caption that repeats its words": 1, "broken character (U+FFFD)": 1, "image under several keys": 4,
        "image in several splits": 2, "image of one colour": 1,
    }  # fmt: skip
    examples = {name: example[:3] for name, (_, example) in findings.items()}
    assert examples["special token in a caption"] == "p12" and examples["image of one colour"] == "p20"
    assert examples["refusal of a labelling model"] in ("p10", "p11") and examples["caption that is cut off"] in (
        "p14",
        "p30",
    )


def test_rounds_texts_and_damage(rows, tmp_path, capsys) -> None:
    """A round shows the edits of its drafts; a truncated shard and a broken image are findings and not errors."""
    stream = io.BytesIO()
    noise(0, (8, 60)).save(stream, "PNG")
    span = {"start": 1, "end": 2, "target_ids": [5], "org": "dog", "target": "cat", "kind": "object"}
    draft = {"prompt": "What?", "text": "A dog sits.", "draft_ids": [4, 4, 4], "spans": [span]}
    shards = [{"__key__": f"k{n}", "json": draft, "png": stream.getvalue()[: None if n else -200]} for n in range(3)]
    write_shards(tmp_path / "round", shards, prefix="round", per_shard=2, kind="round", tokenizer=None)
    text, findings = shown(capsys, f"show={tmp_path / 'round'}")
    assert findings["image of less than 16 pixels"] == (2, "k1") or findings["image of less than 16 pixels"][0] == 2
    assert findings["image that cannot be decoded"] == (1, "k0")
    (row,) = (line.split() for line in text.splitlines() if line.startswith("round ") and "B" in line)
    assert row[1:3] == ["3", "2"] and row[5:] == ["3", "3.0", *"33333"]
    page = Page((tmp_path / "round" / "contact.html").read_text())
    assert page.texts["del"][1:] == ["dog"] * 3 and page.texts["ins"][1:] == ["cat"] * 3
    out = prepare(tmp_path, rows)
    (shard,) = (out / "train").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:20000])
    _, findings = shown(capsys, f"show={out}")
    assert findings["a shard that cannot be read to its end"][1].startswith(str(shard))


@pytest.mark.parametrize("argv", [["show="], ["show=nowhere"], ["show=.", "sed=1"], ["show=.", "seed=x"], ["show=."]])
def test_mistakes_are_one_line(argv, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
