"""The page of `src.generate html=...`: what it holds, replayed here step by step, and what it shows in a browser."""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.collate import image_inputs
from datamodules.shards import Sample
from src.generate import main
from src.generation.player import read_traces, write_page
from src.io.errors import UserError
from src.models.hf.folder import from_pretrained
from src.text.tokenizer import Codec
from testing.files import read_jsonl

BASE = Path(__file__).parents[1] / "assets" / "base"
PROMPT = "Describe the picture."
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8))
ODD = [
    "</script><script>window.boom = 1</script>",
    "<b onclick='x'>\"&amp;",
    " \u202e\u2028\U0001f469\u200d\U0001f52c",
    "\ufffd\x01",
    "a\n\nb",
]


def unpack(page: Path) -> dict:
    """What the script of a page reads, found as a browser finds it: up to the first end tag."""
    return unpacked(page.read_text(encoding="utf-8"))


def unpacked(text: str) -> dict:
    packed = re.search(r'<script id="data" type="text/plain">(.*?)</script', text, re.S)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def states(side: dict) -> list[list[int]]:
    """The ids before the first step and after each one."""
    ids, all_ids = list(side["start"]), [list(side["start"])]
    for _, changes in side["steps"]:
        for position, new, _, _ in zip(*[iter(changes)] * 4, strict=True):
            ids[position] = new
        all_ids.append(list(ids))
    return all_ids


def kinds(side: dict) -> list[list[int]]:
    return [changes[2::4] for _, changes in side["steps"]]


def run(folder: Path, name: str, *settings: str) -> Path:
    out = folder / f"{name}.jsonl"
    images = () if any(s.startswith("images=") for s in settings) else (f"images={folder / 'photos'}", "length=32")
    main(["conf=generate", f"model.path={BASE}", f"prompt={PROMPT}", f"out={out}", *images, *settings])
    return folder / f"{name}.trace.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two photographs, traces of two samplers, and their page; `refine` makes eight steps and more, `plain` four."""
    folder = tmp_path_factory.mktemp("player")
    (folder / "photos").mkdir()
    for number, name in enumerate(["a.png", "b.png"]):
        pixels = np.zeros((48, 48, 3), dtype=np.uint8)
        pixels[8 : 20 + 10 * number, 8:20] = (200, 30, 120 * number)
        Image.fromarray(pixels).save(folder / "photos" / name)
    plain = run(folder, "plain", "sampler=plain", "steps=4", "trace=true")
    run(folder, "refine", "sampler=refine", "steps=8", "post_steps=2", f"html={folder}/page.html", f"compare={plain}")
    return folder


# what the page holds


@pytest.mark.parametrize(
    "settings",
    [
        ["sampler=refine", "steps=8", "post_steps=2"],
        ["sampler=remdm_loop", "steps=16"],
        ["sampler=uniform", "steps=8"],
        ["sampler=refine", "caption=A large red ring is at the top."],
    ],
    ids=lambda settings: settings[0].partition("=")[2] + settings[-1][:7],
)
def test_a_page_replays_every_step(settings, folder, tmp_path):
    (tmp_path / "photos").symlink_to(folder / "photos")
    trace = run(tmp_path, "one", *settings, f"html={tmp_path}/page.html")
    data, lines = unpack(tmp_path / "page.html"), read_jsonl(tmp_path / "one.jsonl")
    assert data["names"] == ["one"] and [text["key"] for text in data["texts"]] == ["a.png", "b.png"]
    codec = Codec.load(BASE)
    for text, line, traced in zip(data["texts"], lines, read_jsonl(trace), strict=True):
        (side,) = text["sides"]
        first, *rest = states(side)
        assert rest == [step["tokens"] for step in traced["steps"]]
        assert [calls for calls, _ in side["steps"]] == [step["forwards"] for step in traced["steps"]]
        assert side["steps"][-1][0] == line["forwards"]
        assert sum(step.count(1) for step in kinds(side)) == line["edits"]
        assert sum(step.count(2) for step in kinds(side)) == sum(len(step["remasked"]) for step in traced["steps"])
        final = rest[-1][: rest[-1].index(codec.eot_id)] if codec.eot_id in rest[-1] else rest[-1]
        final = [token for token in final if token != codec.eos_id]
        assert "".join(side["pieces"][str(token)] for token in final) == line["text"]
        if "caption=" in settings[-1]:
            assert codec.decode(first) == "A large red ring is at the top."
        elif "uniform" not in settings[0]:
            assert set(first) == {codec.mask_id}


def test_confidence_is_what_the_model_gave_the_new_token(folder):
    """Of unmasked and of rewritten tokens, from a forward call of its own on the text before each step."""
    backbone, codec = from_pretrained(BASE, dtype="float32").eval(), Codec.load(BASE)
    side = unpack(folder / "page.html")["texts"][0]["sides"][1]
    pixels = image_inputs([[Image.open(folder / "photos" / "a.png").convert("RGB")]], backbone.layout)
    num_rewritten = 0
    with torch.no_grad():
        prefix = backbone.encode_prefix({"prompt_ids": torch.tensor([codec.prompt_ids(PROMPT)]), **pixels})
        for before, (_, changes) in zip(states(side), side["steps"], strict=False):
            probability = codec.special.ban(backbone(prefix, torch.tensor([before]))[0]).softmax(-1)
            for position, new, kind, percent in zip(*[iter(changes)] * 4, strict=True):
                assert percent == pytest.approx(100 * float(probability[position, new]), abs=0.51)
                num_rewritten += kind == 1
    assert num_rewritten > 3


def random_trace(key: str, *, length: int, num_steps: int, pieces: dict[str, str], seed: int) -> dict:
    """Every token changes in every step: unmasked first, then rewritten."""
    draw, steps, old = random.Random(seed), [], [0] * length
    for number in range(num_steps):
        new = [draw.randrange(3, 3 + len(pieces) - 3) for _ in range(length)]
        values = [draw.random() for _ in range(length)]
        changed = {"unmasked": [], "confidence": [], "rewrite_confidence": values} | {
            "rewritten": [[i, old[i], new[i]] for i in range(length)]
        }
        if not number:
            changed = {"unmasked": [*range(length)], "confidence": values, "rewritten": [], "rewrite_confidence": []}
        steps.append({"tokens": new, "remasked": [], "forwards": number + 1, **changed})
        old = new
    return {"key": key, "special": {"mask": 0, "eot": 1, "eos": 2}, "pieces": pieces, "steps": steps}


def write(path: Path, traces: list[dict]) -> Path:
    path.write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    return path


def requests(traces: list[dict], image: Image.Image | None = None) -> list:
    return [(t["key"], lambda key=t["key"]: Sample(key, {"prompt": "?"}, b"", image)) for t in traces]


def test_a_large_page_stays_small(tmp_path):
    """Eight images of noise, which no JPEG makes smaller, and 128 tokens that all change in each of 128 steps."""
    pieces = {str(token): f" w{token}" for token in range(1000)}
    traces = [random_trace(f"{n}", length=128, num_steps=128, pieces=pieces, seed=n) for n in range(8)]
    write_page(tmp_path / "page.html", [write(tmp_path / "a.trace.jsonl", traces)], requests(traces, IMAGE))
    assert (tmp_path / "page.html").stat().st_size <= 2_000_000
    for text, trace in zip(unpack(tmp_path / "page.html")["texts"], traces, strict=True):
        assert states(text["sides"][0])[1:] == [step["tokens"] for step in trace["steps"]]
        assert max(Image.open(io.BytesIO(base64.b64decode(text["image"].partition("base64,")[2]))).size) == 256


def odd_page(tmp_path: Path) -> Path:
    pieces = {str(token): text for token, text in enumerate(["<mask>", "<eot>", "<eos>", *ODD])}
    traces = [random_trace("<i>&\"'</script>", length=len(ODD), num_steps=3, pieces=pieces, seed=0)]
    traces[0]["steps"][-1]["rewritten"] = [[i, old, i + 3] for i, old, _ in traces[0]["steps"][-1]["rewritten"]]
    traces[0]["steps"][-1]["tokens"] = [i + 3 for i in range(len(ODD))]
    write_page(tmp_path / "page.html", [write(tmp_path / "a<b>.trace.jsonl", traces)], requests(traces))
    return tmp_path / "page.html"


def test_odd_tokens_are_kept_and_end_no_script(tmp_path):
    page = odd_page(tmp_path)
    (text,) = unpack(page)["texts"]
    assert [text["sides"][0]["pieces"][str(3 + i)] for i in range(len(ODD))] == ODD
    assert text["key"] == "<i>&\"'</script>" and page.read_text().count("</script") == 2


def test_only_a_trace_file_can_be_compared(folder, tmp_path, capsys):
    for file in (folder / "plain.jsonl", tmp_path / "none.trace.jsonl", folder / "photos" / "a.png"):
        with pytest.raises(UserError, match="is no trace file"):
            read_traces(file)
    with pytest.raises(SystemExit):
        run(folder, "more", f"compare={folder}/plain.trace.jsonl")
    assert "is for a page: name one, as in html=trace.html" in capsys.readouterr().err
    assert not (folder / "more.jsonl").exists()
