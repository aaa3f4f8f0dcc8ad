"""Preparing texts without images: packing, prompts with responses, molecules; what is left out, and real files."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from src.io.errors import UserError
from src.io.shards import read_shard
from src.preparation.counts import Counts
from src.preparation.smiles import Smiles, count_rings
from src.preparation.text import Packed, Pairs, Texts
from src.prepare import main
from src.text.tokenizer import BOS, EOS, SPECIAL, Codec
from testing.verbs import refusal

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not (SHARED / "text").is_dir(), reason="the folder of real data is not there")
SPLITS = ("train", "val", "test")
DOCUMENTS = [f"Text {n} is of {'long ' * (n % 7)}words,\n\n as \u00e9 or \U0001f600 " + "x" * n for n in range(60)]


def records(folder: Path) -> list[dict]:
    index = json.loads((folder / "index.json").read_text())
    return [sample["json"] for shard in index["shards"] for sample in read_shard(folder / shard["name"])]


def write_jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def made(dataset: Texts) -> tuple[dict, dict[str, list[dict]], Codec]:
    """What a dataset wrote: its index, the records of each split, the tokenizer."""
    index, out = dataset.run(), Path(dataset.out)
    return index, {split: records(out / split) for split in SPLITS}, Codec.load(out / "tokenizer")


def ids_of(rows: list[dict]) -> list[int]:
    return [token for row in rows for token in row["captions"][0]["ids"]]


# --- packing -----------------------------------------------------------------------------------------


def packed(tmp_path: Path, **changed: Any) -> Packed:
    settings: dict[str, Any] = {"response_length": 16, "vocab_size": 320, "prompt_format": "plain", **changed}
    return Packed(out=str(tmp_path / "out"), **settings)


def test_rows_are_the_documents_of_a_split_one_after_another(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "docs.jsonl", [{"text": text} for text in DOCUMENTS])
    _, rows, codec = made(packed(tmp_path, files=str(file)))
    used: list[str] = []
    for split in SPLITS:
        assert rows[split] and {len(row["captions"][0]["ids"]) for row in rows[split]} == {16}
        assert {row["prompt"] for row in rows[split]} == {""}
        *documents, _ = codec.tokenizer.decode(ids_of(rows[split])).split(EOS)
        used += documents
        whole = [token for text in documents for token in (*codec.encode(text)[0], codec.eos_id)]
        assert ids_of(rows[split])[: len(whole)] == whole
    assert len(used) == len(set(used)) > 50 and set(used) <= set(DOCUMENTS)


def test_a_book_is_cut_into_consecutive_parts(tmp_path: Path) -> None:
    """The written-out oracle: all tokens of all documents, each with end-of-text, in order; only the end is missing."""
    file = tmp_path / "book.txt"
    file.write_text(f"{DOCUMENTS[5]}{EOS}\n{DOCUMENTS[6]}\r\nmore\r{EOS}{EOS}" + " ".join(DOCUMENTS), encoding="utf-8")
    index, rows, codec = made(packed(tmp_path, files=[str(file)], split="rows"))
    expected: list[int] = []
    for text in (DOCUMENTS[5].strip(), f"{DOCUMENTS[6]}\nmore".strip(), " ".join(DOCUMENTS).strip()):
        expected += [*codec.encode(text)[0], codec.eos_id]
    count = len(expected) // 16
    assert ids_of([*rows["train"], *rows["val"], *rows["test"]]) == expected[: count * 16]
    assert [len(rows[split]) for split in SPLITS] == [
        round(0.9 * count), round(0.95 * count) - round(0.9 * count), count - round(0.95 * count)
    ]  # fmt: skip
    assert index["counts"]["test"]["tokens_left"] == len(expected) % 16
    assert index["counts"]["records"] == {"records": 4, "empty_text": 1}
    assert index["row"] == json.loads((tmp_path / "out" / "train" / "index.json").read_text())["row"] == 16
    assert codec.prompt_ids("", images=0) == [codec.bos_id]


def test_gpt2_is_read_from_two_files_and_keeps_its_ids(tmp_path: Path) -> None:
    """A byte-level BPE written out by hand: 256 bytes and one merge, without a mask token."""
    base = Codec.train([""], vocab_size=0, alphabet="bytes").tokenizer.get_vocab()
    vocabulary = {token: n for n, token in enumerate([*sorted(t for t in base if len(t) == 1), "th", EOS])}
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("t h\n")
    (tmp_path / "a.txt").write_text("the path " * 50)
    _, rows, codec = made(packed(tmp_path, files=str(tmp_path / "a.txt"), tokenizer=str(folder), split="rows"))
    assert codec.eos_id == vocabulary[EOS] and codec.mask_id >= len(vocabulary) and codec.bos_id >= len(vocabulary)
    assert rows["train"][0]["captions"][0]["ids"][:4] == [vocabulary[t] for t in ("th", "e", "\u0120", "p")]
    adopted = Codec.adopt(tmp_path / "out" / "tokenizer")
    assert adopted.fingerprint == codec.fingerprint and adopted.prompt_format == codec.prompt_format
    with pytest.raises(ValueError, match=r"gpt2 has no chat template: set prompt_format"):
        Codec.adopt(folder)
    with pytest.raises(ValueError, match=r"expected tokenizer.json, or vocab.json and merges.txt"):
        Codec.adopt(tmp_path)


# --- prompts with responses --------------------------------------------------------------------------


def pairs(tmp_path: Path, **changed: Any) -> Pairs:
    settings: dict[str, Any] = {"out": str(tmp_path / "out"), "response_length": 40, "vocab_size": 300}
    return Pairs(**{**settings, "prompt": "question", "response": "answer", "max_prompt": 60, **changed})


def test_malformed_rows_are_counted_with_an_example_and_left_out(tmp_path: Path) -> None:
    good = [json.dumps({"question": f"What is {n}+{n}?", "answer": f"It is {2 * n}."}).encode() for n in range(9)]
    bad = [
        b'{"question": "cut off',
        b'{"question": "a", "answer": "\xff\xfe"}',
        b'{"question": "null", "answer": null}',
        b'{"question": "a number", "answer": 72}',
        b'{"question": "blank", "answer": " \\r\\n "}',
        b'{"question": "half a pair", "answer": "\\ud800"}',
        b'{"question": "<image> what?", "answer": "b"}',
        b'{"question": "long answer", "answer": "' + b"ab " * 200 + b'"}',
        b'{"question": "' + b"long question" * 90 + b'", "answer": "b"}',
        good[3],
        b'{"question": "a\\r\\nb", "answer": "c\\rd"}',
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*good, *bad]) + b"\n")
    index, rows, _ = made(pairs(tmp_path, files=str(file)))
    assert index["counts"]["records"] == {
        "records": 20, "broken_json": 1, "not_utf-8": 2, "missing_field": 1, "not_a_text": 1, "empty_text": 1,
        "image_mark": 1, "responses too long": 1, "prompts too long": 1, "duplicate_text": 1,
    }  # fmt: skip
    assert index["examples"]["records"] == {
        "broken_json": "rows.jsonl:10", "not_utf-8": "rows.jsonl:11",
        "missing_field": "rows.jsonl:12 (its fields: question, answer)", "not_a_text": "rows.jsonl:13",
        "empty_text": "rows.jsonl:14", "image_mark": "rows.jsonl:16",
        "responses too long": "rows.jsonl:17: 201 tokens, and prepare.response_length=40 holds 39",
        "prompts too long": "rows.jsonl:18", "duplicate_text": "rows.jsonl:19",
    }  # fmt: skip
    pairs_written = {(row["prompt"], row["captions"][0]["text"]) for split in SPLITS for row in rows[split]}
    assert pairs_written == {(f"What is {n}+{n}?", f"It is {2 * n}.") for n in range(9)} | {("a\nb", "c\nd")}
    assert all(rows[split] for split in SPLITS)


def test_files_that_name_their_split_keep_it_and_train_gets_nothing_of_test(tmp_path: Path) -> None:
    lines = [{"question": f"q{n}", "answer": f"a{n}", "task_id": n, "more": 1} for n in range(8)]
    train = write_jsonl(tmp_path / "train.jsonl", lines)
    test = write_jsonl(tmp_path / "test.jsonl", [lines[2], {"question": "other", "answer": "b"}])
    index, rows, _ = made(pairs(tmp_path, files={"train": str(train), "test": str(test)}, keep=["task_id"]))
    assert [row["source"] for row in rows["test"]] == ["test.jsonl:1", "test.jsonl:2"]
    assert [row.get("task_id") for row in rows["train"]] == [0, 1, 3, 4, 5, 6, 7]
    assert rows["val"] == [] and rows["test"][0]["captions"] == [{"text": "a2"}] and "more" not in rows["train"][0]
    assert index["counts"]["records"]["duplicate_text"] == 1


def test_nothing_usable_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "reply": "r"}])
    message = refusal(main, ["conf=sft", f"prepare.files={file}", f"prepare.out={tmp_path / 'out'}"], capsys)
    assert "nothing could be used" in message
    assert "1  missing field (left out), such as a.jsonl:1 (its fields: question, reply)" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
    argv = ["conf=text", f"prepare.files={{dev: {file}}}", f"prepare.out={tmp_path / 'out'}"]
    assert "files names ['dev']" in refusal(main, argv, capsys)


# --- molecules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("smiles", "rings"),
    [
        ("CCO", 0), ("C1CC1", 1), ("c1ccccc1", 1), ("c1ccc2ccccc2c1", 2), ("C1CC2CCC1C2", 2), ("C12C3C4C1C5C2C3C45", 5),
        ("CN1C=NC2=C1C(=O)N(C(=O)N2C)C", 2), ("C%10CC%10", 1), ("C%(100)CC%(100)", 1), ("C1CC1C1CC1", 2),
        ("[13CH3][NH3+]", 0), ("C[C@@H](N)[C@H]1OC1", 1), ("C=1CCC=1", 1),
        ("[Na+].[Cl-]", 0), ("C1.C1", 0), ("C12.C1CC2", 1), ("C1CC1.c1ccccc1", 2),
    ],
)  # fmt: skip
def test_rings(smiles: str, rings: int) -> None:
    assert count_rings(smiles) == rings


@pytest.mark.parametrize("smiles", ["C1CC", "C(C", "C)C", "[CH3", "C]", "C%1"])
def test_smiles_that_are_not_closed(smiles: str) -> None:
    with pytest.raises(ValueError, match=r"left open|was not opened"):
        count_rings(smiles)


@needs_real_data
def test_rings_are_those_of_rdkit() -> None:
    """A smallest set of rings, of every 50th molecule. (`CalcNumRings` counts more in cages.)"""
    chemistry = pytest.importorskip("rdkit.Chem")
    with (SHARED / "text" / "qm9_smiles.csv").open() as stream:
        molecules = [row["smiles"] for row in csv.DictReader(stream)][::50]
    assert len(molecules) > 1000
    for smiles in molecules:
        assert count_rings(smiles) == len(chemistry.GetSSSR(chemistry.MolFromSmiles(smiles, sanitize=False))), smiles


def test_molecules_get_the_class_of_their_rings(tmp_path: Path) -> None:
    chains = [f"{'C' * n}O{'C' * m}" for n in range(1, 11) for m in range(9)]
    rings = ["C1CC1" + "C" * n for n in range(8)] + ["C1CC1C1CC1" + "C" * n for n in range(8)]
    file = tmp_path / "m.csv"
    file.write_text("smiles,id\n" + "".join(f"{s},1\n" for s in [*chains, *rings, "C1CC", "", rings[0], "C" * 50]))
    dataset = Smiles(out=str(tmp_path / "out"), files=str(file), response_length=20, prompt_format="plain")
    index, rows, codec = made(dataset)
    assert index["counts"]["records"] == {
        "records": len(chains) + 20, "broken_smiles": 1, "empty_text": 1, "duplicate_text": 1, "responses too long": 1
    }  # fmt: skip
    trained = [row["rings"] for row in rows["train"]]
    threshold = np.percentile(trained, 90)
    assert index["label"] == {"property": "rings", "percentile": 90.0, "threshold": threshold}
    for split in SPLITS:
        for row in rows[split]:
            text = row["captions"][0]["text"]
            assert row["rings"] == sum(c.isdigit() for c in text) // 2
            assert row["prompt"] == ("1" if row["rings"] >= threshold else "0")
            assert codec.prompt_ids(row["prompt"], images=0) == [codec.bos_id, codec.encode(row["prompt"])[0][0]]
            assert len(codec.encode(text)[0]) == len(text)
        assert index["counts"][split]["class_1"] == sum(row["prompt"] == "1" for row in rows[split])
    assert codec.vocab_size == 7 + len(set("CO1") | {"0"})
    assert codec.tokenizer.get_vocab().keys() >= {BOS, EOS}


def test_a_column_may_decide_the_class(tmp_path: Path) -> None:
    file = tmp_path / "m.csv"
    values = ["0.5", "nan", "high", ""] + [str(n) for n in range(40)]
    file.write_text("smiles,qed\n" + "".join(f"{'C' * (n + 1)},{value}\n" for n, value in enumerate(values)))
    dataset = Smiles(out=str(tmp_path / "out"), files={"train": str(file)}, response_length=60, value="qed")
    index, rows, _ = made(dataset)
    assert index["counts"]["records"] == {"records": 44, "not_a_number": 3}
    assert Counter(row["prompt"] for row in rows["train"]) == {"0": 36, "1": 5}  # 5 of 41 reach the 90th percentile
    assert {row["qed"] for row in rows["train"] if row["prompt"] == "1"} == {35, 36, 37, 38, 39}


# --- rows that a tokenizer cannot hold, and settings that cannot be meant -----------------------------


def test_rows_that_the_tokenizer_does_not_give_back_are_left_out(tmp_path: Path) -> None:
    """A tokenizer of whole words with a token for all that is unknown."""
    words = ["[UNK]", EOS, "a", "red", "ring", "what", "user", "assistant", "system"]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    (tmp_path / "words").mkdir()
    backend.save(str(tmp_path / "words" / "tokenizer.json"))
    lines = [{"question": q, "answer": a} for q, a in [("what", "a  red ring"), ("what", "a blue ring"), ("who", "a")]]
    file = write_jsonl(tmp_path / "a.jsonl", lines)
    dataset = pairs(tmp_path, files={"train": str(file)}, tokenizer=str(tmp_path / "words"), prompt_format="plain")
    index, rows, _ = made(dataset)
    assert [row["captions"][0]["text"] for row in rows["train"]] == ["a  red ring"]
    assert index["counts"]["records"] == {"records": 3, "not_in_vocabulary": 2}


def test_prompts_and_texts_that_spell_out_special_tokens_are_text(tmp_path: Path) -> None:
    lines = [{"question": f"q{n} {token}", "answer": f"{token} b"} for n, token in enumerate(["", *SPECIAL[:-1]])]
    file = write_jsonl(tmp_path / "a.jsonl", lines)
    index, rows, codec = made(pairs(tmp_path, files={"train": str(file)}))
    assert [row["prompt"] for row in rows["train"]] == [line["question"] for line in lines]
    assert index["counts"]["records"] == {"records": 7}
    control = set(codec.special.unwritten)
    assert len({sum(token in control for token in codec.prompt_ids(row["prompt"])) for row in rows["train"]}) == 1
    assert not any(control & set(codec.encode(row["captions"][0]["text"])[0]) for row in rows["train"])


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
def test_mistakes_are_one_line(settings, words, tmp_path, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "C", "key": 1}])
    argv = [settings[0], f"prepare.files={file}", f"prepare.out={tmp_path / 'out'}", *settings[1:]]
    assert words in refusal(main, argv, capsys)
    assert not (tmp_path / "out").exists()


# --- real files --------------------------------------------------------------------------------------


# --- record files that people have -------------------------------------------------------------------


def test_no_value_and_lost_turns_are_never_trained(tmp_path: Path) -> None:
    """NaN as Pandas writes it into a table; a system text, whatever the name of the prompt."""
    rows = ["instruction,output,input,system", "a,nan,,", "b,B,nan,NaN", "c,C,d,", "e,E,,You are a poet."]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    fields = {"prompt": "Instruction", "response": "output"}
    items = list(pairs(tmp_path, files=str(tmp_path / "a.csv"), **fields).read(counts := Counts()))
    assert [(item.prompt, item.text) for item in items] == [("b", "B"), ("c\n\nd", "C")]
    assert counts == {"records": 4, "missing_field": 1, "system_text": 1}
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "history": [["Hi", "Hello"]]}])
    assert not list(pairs(tmp_path, files=str(file)).read(counts := Counts())) and counts["earlier_turns"] == 1


def test_texts_are_read_from_parquet_and_from_all_files_of_a_pattern(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for number in range(2):
        table = pyarrow.table({"question": [f"q{number}"], "answer": ["a"]})
        parquet.write_table(table, tmp_path / f"part-{number}.parquet")
    dataset = pairs(tmp_path, files=str(tmp_path / "part-*.parquet"))
    assert [item.prompt for item in dataset.read(Counts())] == ["q0", "q1"]
    assert dataset.inputs == [str(tmp_path / f"part-{number}.parquet") for number in range(2)]
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b")
    for name, message in {"a.jsonl.gz": "is compressed: unpack it first", "none-*.jsonl": "no file .*none-"}.items():
        with pytest.raises(UserError, match=message):
            list(pairs(tmp_path, files=str(tmp_path / name)).read(Counts()))
