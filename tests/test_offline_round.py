"""A round by hand: the verbs draft, revise and train, each started as the one before says."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import src.draft
import src.revise
import src.train
from src.io.shards import read_manifest
from src.models.hf.folder import save_pretrained
from src.models.tiling import anyres
from src.models.tiny import tiny
from src.preparation.photos import Photos
from src.text.tokenizer import Codec
from src.types import Round
from testing.scenes import BASE, write_scenes

ROOT = Path(__file__).resolve().parents[1]
NUM = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_train": NUM, "num_val": 1, "num_test": 1, "prompt": "Describe the picture."}
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", **sizes)


def draft(data: Path, folder: Path, *settings: str) -> None:
    src.draft.main([
        "conf=draft", f"model.path={BASE}", f"data.path={data}", f"out={folder / 'drafts'}", "tokens_per_step=[32]",
        *settings,
    ])  # fmt: skip


def next_command(printed: str, verb: str) -> list[str]:
    """The arguments of the command in the last line."""
    words = shlex.split(printed.splitlines()[-1])
    assert words[:4] == ["next:", "python", "-m", f"src.{verb}"]
    return words[4:]


def test_each_verb_says_the_next_one(data: Path, tmp_path: Path, monkeypatch, capsys, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        draft(data, tmp_path)  # num is 1024
    assert [r.getMessage() for r in caplog.records if "num" in r.getMessage()] == [
        f"num=1024 is more than the {NUM} training images: each of them is drafted once"
    ]
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path / 'drafts'}: {NUM} drafts\n")
    src.revise.main(next_command(printed, "revise"))
    made = read_manifest("rounds/round-0001")
    assert made["counts"]["written"] > 0
    arguments = next_command(capsys.readouterr().out, "train")
    assert arguments == ["conf=stage2", "data.rounds=[rounds/round-0001]", "callbacks.self_correction=null"]
    assert shlex.join(["python", "-m", "src.train", *arguments]) in (src.revise.__doc__ or "")

    small = ["data.batch_size=4", "data.workers=0", "trainer.max_steps=2", "trainer.limit_val_batches=0"]
    small += ["callbacks.samples=null", "optim.warmup_steps=1", "run_dir=run"]
    src.train.main([*arguments, f"model.path={BASE}", f"tokenizer={BASE}", f"data.path={data}", *small])
    (last,) = Path("run/checkpoints").glob("last*.ckpt")
    kept = torch.load(last, weights_only=False).values()
    (rounds,) = (state["rounds"] for state in kept if isinstance(state, dict) and "rounds" in state)
    assert [Path(entry["path"]).name for entry in rounds] == ["round-0001"]


@pytest.mark.parametrize("tiling", [None, anyres(16, columns=2, rows=1)])
def test_images_are_cut_as_the_model_takes_them(data: Path, tmp_path: Path, capsys, tiling) -> None:
    """Whatever conf/draft.yaml would need; another size by hand is refused before the model is read."""
    codec, size = Codec.load(BASE), 16 if tiling else 32
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tiny(codec, decoder=sizes, vision={**sizes, "image_size": size, "patch_size": 8}, tiling=tiling)
    save_pretrained(model, codec, tmp_path / "model")
    draft(data, tmp_path, f"model.path={tmp_path / 'model'}", "num=2")
    settings = read_manifest(tmp_path / "drafts")["settings"]
    assert (settings["image_size"], settings["tiling"]) == (size, tiling and json.loads(json.dumps(tiling.to_dict())))
    with pytest.raises(SystemExit):
        draft(data, tmp_path, f"model.path={tmp_path / 'model'}", "data.image_size=48")
    assert f"pixels, model means {model.layout}" in capsys.readouterr().err


def test_drafts_of_photographs_go_to_the_reference_expert(tmp_path: Path, capsys) -> None:
    records = [{"image": f"{n}.png", "caption": "The picture shows one object."} for n in range(4)]
    for record in records:
        Image.new("RGB", (8, 8), "red").save(tmp_path / record["image"])
    (tmp_path / "a.json").write_text(json.dumps(records))
    places = {"images": str(tmp_path), "annotations": str(tmp_path / "a.json"), "tokenizer": str(BASE)}
    sizes = {"image_size": 48, "vocab_size": 300, "response_length": 64, "prompt": "Describe the picture."}
    Photos(out=str(tmp_path / "d"), **places, **sizes).run()
    draft(tmp_path / "d", tmp_path, "round=3", "num=1")
    assert next_command(capsys.readouterr().out, "revise") == [
        "conf=revise,expert/reference", f"drafts={tmp_path / 'drafts'}", "out=rounds/round-0003", f"tokenizer={BASE}"
    ]  # fmt: skip


def manifest(**counts: int) -> dict[str, Any]:
    names = ("drafted", "revised", "right", "unusable", "failed", "unanswered", "edits", "written")
    return {"counts": dict.fromkeys(names, 0) | counts, "rejected": {}, "failures": {}}


def test_the_report_gives_reasons() -> None:
    """`revised` of the manifest holds right and unusable drafts; the report tells them apart."""
    counts = manifest(drafted=30, revised=21, right=4, unusable=2, failed=7, unanswered=2, edits=40, written=15)
    counts |= {"rejected": {"absent": 1, "unequal_length": 5}, "failures": {"no_local_edit": 6, "timeout": 1}}
    assert src.revise.report(Round(Path("my rounds/r"), counts)).splitlines() == [
        "30 drafted: 15 corrected, 4 right, 2 with no edit that could be placed, 7 failed, 2 unanswered",
        "failed: 7 (no_local_edit 6, timeout 1)",
        "edits: 40 placed, 6 could not be (unequal_length 5, absent 1)",
        "to look at it: python -m src.prepare show='my rounds/r'",
        "next: python -m src.train conf=stage2 'data.rounds=[my rounds/r]' callbacks.self_correction=null",
    ]
