"""Preparing texts: rows that a tokenizer cannot hold, settings that cannot be meant, and what is told of both."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from src.io.shards import read_shard
from src.preparation.smiles import Smiles
from src.preparation.text import Pairs
from src.prepare import main
from src.text.tokenizer import EOS, SPECIAL, Codec, _pieces


def write_jsonl(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def made(tmp_path: Path, lines: list[dict], **more: Any) -> tuple[dict, list[dict], Codec]:
    """What pairs of these lines, all of train, come to: counts of records, the rows, the tokenizer."""
    out, file = tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", lines)
    given: dict[str, Any] = {"files": {"train": str(file)}, "response_length": 40, "vocab_size": 300, **more}
    index = Pairs(out=str(out), prompt="question", response="answer", **given).run()
    rows = [sample["json"] for path in sorted((out / "train").glob("*.tar")) for sample in read_shard(path)]
    return index["counts"]["records"], rows, Codec.load(out / "tokenizer")


def test_rows_that_the_tokenizer_does_not_give_back_are_left_out(tmp_path: Path) -> None:
    """A tokenizer of whole words with a token for all that is unknown."""
    words = ["[UNK]", EOS, "a", "red", "ring", "what", "user", "assistant", "system"]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    (tmp_path / "words").mkdir()
    backend.save(str(tmp_path / "words" / "tokenizer.json"))
    lines = [{"question": q, "answer": a} for q, a in [("what", "a  red ring"), ("what", "a blue ring"), ("who", "a")]]
    counts, rows, _ = made(tmp_path, lines, tokenizer=str(tmp_path / "words"), prompt_format="plain")
    assert [row["captions"][0]["text"] for row in rows] == ["a  red ring"]
    assert counts == {"records": 3, "not_in_vocabulary": 2}


def test_prompts_that_spell_out_special_tokens_are_left_out(tmp_path: Path) -> None:
    lines = [{"question": f"q{n} {token}", "answer": token or "b"} for n, token in enumerate(["", *SPECIAL[:-1]])]
    counts, rows, _ = made(tmp_path, lines)
    assert [row["prompt"] for row in rows] == ["q0 "]
    assert counts == {"records": 7, "special_token": 6}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["conf=sft", "prepare.keep=[key]"], "a sample has 'key' of its own; rename the field in"),
        (["conf=sft", "prepare.keep=[nope]"], "prepare.keep: no record has a field 'nope'"),
        (
            ["conf=sft", "prepare.vocab_size=5"],
            "prepare.vocab_size=5 is too small: the alphabet and the special tokens",
        ),
        (["conf=sft", "prepare.files=7"], "files: expected"),
        (["conf=sft", "prepare.files={train: 7}"], "files: expected"),
        (["conf=smiles", "prepare.field=answer", "prepare.value=key"], "a sample has 'key' of its own"),
        (["conf=text", "prepare.split=words"], "split: expected Literal['documents', 'rows'], got 'words'"),
        (["conf=text", "prepare.files={train: a.txt}", "prepare.split=rows"], "no file a.txt"),
    ],
)
def test_mistakes_are_one_line(
    settings: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "C", "key": 1}])
    with pytest.raises(SystemExit) as stop:
        main([settings[0], f"prepare.files={file}", f"prepare.out={tmp_path / 'out'}", *settings[1:]])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_class_without_molecules_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "m.csv"
    file.write_text("smiles\n" + "".join("C" * n + "\n" for n in range(1, 30)))
    Smiles(out=str(tmp_path / "out"), files=str(file), response_length=40, prompt_format="plain").run()
    assert "all molecules of train are of class 1, as the percentile 90 of rings is 0" in caplog.text


def test_one_enormous_word_does_not_stall_the_training_of_a_tokenizer() -> None:
    """Quadratic in the word, this takes minutes; the pieces are the text, and other texts stay whole."""
    word = "abcdefghij" * 100_000
    start = time.monotonic()
    Codec.train([word], vocab_size=300, alphabet="bytes")
    assert time.monotonic() - start < 20
    for text in (word, "a " * 5000, " " * 5000 + "b", "\n" * 3000):
        pieces = _pieces(text)
        assert "".join(pieces) == text
        assert max(len(run) for piece in pieces for run in re.findall(r"\S+|\s+", piece)) <= 1000
    assert _pieces("a " * 5000) == ["a " * 5000]
