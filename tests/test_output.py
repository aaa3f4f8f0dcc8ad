"""The file that `src.generate` writes: one process at a time, a full disk, places where nothing can be written."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from src.generate import main
from src.models.hf.folder import save_pretrained
from src.models.llada_v import LLaDAV
from src.text.tokenizer import Codec
from testing.files import read_jsonl
from testing.verbs import refusal

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    codec = Codec.train(["Why is a red ring round?"], vocab_size=60)
    path = tmp_path_factory.mktemp("models") / "model"
    save_pretrained(LLaDAV(decoder={"vocab_size": codec.vocab_size, **SIZES}, vision=None), codec, path)
    return path


def questions(tmp_path: Path, count: int) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"key": f"q{number}", "prompt": "Why?"}) + "\n" for number in range(count)))
    return file


def argv(model: Path, out: Path | str, prompt: Path | str = "Why?", *more: str) -> list[str]:
    settings = [f"model.path={model}", "images=null", f"prompt={prompt}", f"out={out}", "batch_size=1"]
    return ["conf=generate", *settings, "sampler=plain", "length=32", "tokens_per_step=1", *more]


def keys(out: Path) -> list[str]:
    return [line["key"] for line in read_jsonl(out)]


def test_a_full_disk_is_one_line_and_a_rerun_continues(model, tmp_path, capsys):
    """No file of this process may grow beyond a size for a while: the system refuses as where a disk is full."""
    out, whole, file = tmp_path / "out.jsonl", tmp_path / "whole.jsonl", questions(tmp_path, 6)
    main(argv(model, whole, file))
    size = whole.stat().st_size // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(SystemExit) as stop:
            main(argv(model, out, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.value.code == 1
    assert f"error: {out}: File too large" in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes()[:size]
    main(argv(model, out, file))
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("out", "words", "code"),
    [("{folder}", "Is a directory", 1), ("{file}/x.jsonl", "File exists", 1), ("", "out: expected a path, got ''", 2)],
)
def test_where_nothing_can_be_written(out, words, code, model, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    message = refusal(main, argv(model, out.format(folder=tmp_path, file=tmp_path / "file")), capsys, code=code)
    assert words in message and "Traceback" not in message
    assert "generate:" not in message  # no progress bar: the model was not run
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("content", ["a letter without an end", "[1]\n", '{"text": "no key"}\n'])
def test_a_file_of_somebody_else_is_left_alone(content, model, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    assert f"line 1 of {out} is broken" in refusal(main, argv(model, out), capsys)
    assert out.read_text() == content
