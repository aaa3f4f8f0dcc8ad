"""Sources of photographs: what stands in files that people really have is read right, or left out with a reason."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import sys
import tracemalloc
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from src.cli.config import load_config
from src.cli.instantiate import build
from src.io.errors import UserError
from src.io.shards import read_shard
from src.preparation import json_text
from src.preparation.counts import Counts
from src.preparation.json_text import JsonText
from src.preparation.photos import Photos
from src.preparation.records import read_records
from src.preparation.sources.source import Source
from src.preparation.text import Pairs

COCO = "COCO_val2014_000000000042.jpg"
PLAIN = "000000000042.jpg"


def picture(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, "PNG" if "#" in path.suffix else None)


def read(folder: Path, name: str, content: str | bytes, images: tuple[str, ...], **settings: Any):
    """((image file, captions) of each record, counts) of an annotation file for images in folder/photos."""
    (folder / "photos").mkdir()
    for image in images:
        picture(folder / "photos" / image)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    source = Source(annotations=str(folder / name), images=str(folder / "photos"), **settings)
    entries = list(source.read(counts := Counts(), seed=0))
    return entries, counts


dump = json.dumps


def lines(*records: dict) -> str:
    return "\n".join(map(json.dumps, records))


def record(image: Any, caption: Any = "A") -> dict:
    return {"image": image, "caption": caption}


def talk(*turns: str, image: str = "a.jpg", first: str = "human") -> dict:
    roles = {"human": ("human", "gpt"), "gpt": ("gpt", "human"), "system": ("system", "human", "gpt")}[first]
    values = [{"from": roles[n % len(roles)], "value": text} for n, text in enumerate(turns)]
    return {"image": image, "conversations": values}


# file, content -> image and captions of each record that is used, and what is left out with its example
FILES: dict[str, tuple[str, str | bytes, list, dict[str, str]]] = {
    "bad byte in lines": ("a.jsonl", (lines(record("a.jpg"), record("b.jpg", "!"), record("c.jpg"))).encode()
                          .replace(b"!", b"\xff"), [("a", "A"), ("c", "A")], {"not_utf-8": "a.jsonl:2"}),
    "bad byte in a list": ("a.json", dump([record("a.jpg"), record("b.jpg", "!"), record("c.jpg")]).encode()
                           .replace(b"!", b"\xff"), [("a", "A"), ("c", "A")], {"not_utf-8": "a.json#2"}),
    "half a pair": ("a.json", dump([record("a.jpg", "A \ud83d"), record("b\ud83d.jpg"), record("c.jpg")]),
                    [("c", "A")], {"not_utf-8": "a.json#1"}),
    "half a pair in a question": ("a.json", dump([talk("Q \ud83d", "A"), record("c.jpg")]), [("c", "A")],
                                  {"not_utf-8": "a.json#1"}),
    "commas behind lines": ("a.json", lines(record("a.jpg")) + ",\n" + lines(record("b.jpg")), [("a", "A"), ("b", "A")],
                            {"broken_json": "a.json:1"}),
    "a list in lines": ("a.jsonl", dump([record("a.jpg"), record("b.jpg")], indent=1), [("a", "A"), ("b", "A")], {}),
    "data": ("a.json", dump({"info": {}, "data": [record("a.jpg")]}), [("a", "A")], {}),
    "splits": ("a.json", dump({"train": [record("a.jpg")], "val": [record("b.jpg")]}), [("a", "A"), ("b", "A")], {}),
    "names with captions": ("a.json", dump({"a.jpg": "A", "b.jpg": ["B", "C"], "c.avif": "x", "d.jpg": {"text": "D"}}),
                            [("a", "A"), ("b", "B"), ("b", "C"), ("d", "D")], {"missing_image": "c.avif"}),
    "ids with records": ("a.json", dump({"0": record("a.jpg"), "1": None}), [("a", "A")],
                         {"not_a_record": "a.json#2"}),
    "Karpathy": ("dataset_coco.json", dump({"dataset": "coco", "images": [
        {"filename": "a.jpg", "sentences": [{"raw": "A", "tokens": ["a"]}, {"raw": "B"}], "split": "restval"}]}),
                 [("a", "A", "B")], {}),
    "COCO, images last": ("a.json", dump({"annotations": [{"image_id": 1, "caption": "A"}], "info": {}, "images": [
        {"id": 1, "file_name": "a.jpg"}]}), [("a", "A")], {}),
    "nested captions": ("a.json", dump([record("a.jpg", [["A", ["B", None, " "]]]), record("b.jpg", ["B", 7])]),
                        [("a", "A", "B")], {"caption_not_text": "a.json#2"}),
    "columns of several formats": ("a.json", '[{"image": "a.jpg", "caption": "A", "conversations": null, "text": null, '
                                   '"original_caption": null, "changed_caption": null, "split": NaN, "prompt": NaN}, '
                                   '{"image": "c.jpg", "video": null, "caption": null, "messages": '
                                   '[{"role": "assistant", "content": "C"}]}, '
                                   '{"image": NaN, "file_name": "b.jpg", "caption": NaN, "text": "B"}]',
                                   [("a", "A"), ("c", "C"), ("b", "B")], {}),
    "sentences": ("a.json", dump({"images": [{"image": "a.jpg", "sentences": [{"raw": "A"}]},
                                             {"image": "b.jpg", "sentences": ["B"], "filename": None}]}),
                  [("a", "A"), ("b", "B")], {}),
    "bytes as numbers": ("a.json", dump([record({"bytes": [255, 216], "path": "a.jpg"}), record("b.jpg")]),
                         [("b", "A")], {"no_image": "a.json#1"}),
    "splits that are none": ("a.json", dump([{**record("a.jpg"), "split": split} for split in
                                             (0, ["test"], True, "dev2", " Test ", "restval", "")]),
                             [("a", "A")] * 3, {"unknown_split": "a.json#1 (0)"}),
    "system texts": ("a.json", dump([
        talk("S", "Q", "A", first="system"), {**talk("Q", "A"), "system_prompt": "S"},
        {"image": "a.jpg", "messages": [{"role": "system", "content": ""}, {"role": "assistant", "content": "A"}]}]),
                     [("a", "A")], {"system_text": "a.json#1"}),
    "an answer before the question": ("a.json", dump([talk("Hi", "Q", "A", first="gpt"), record("c.jpg")]),
                                      [("c", "A")], {"turns_out_of_order": "a.json#1"}),
    "questions": ("a.json", dump([{**record("a.jpg"), "prompt": ["Q", "R"]}, {**record("b.jpg"), "prompt": ["Q"]}]),
                  [("b", "A")], {"question_not_text": "a.json#1"}),
    "edits of a caption": ("a.json", dump([
        {**record("a.jpg", "A dog."), "revise": [{"org": "dog", "target": "cat"}]}, {**record("b.jpg"), "revise": []},
        {**record("c.jpg", "A dog."), "revise": "right"}, {**record("d.jpg", ["A", "B"]), "revise": []}]),
                           [("a", "A cat."), ("b", "A")], {"revise_not_a_list": "a.json#3",
                                                           "revise_of_several_captions": "a.json#4"}),
    "questions with answers": ("a.json", dump([
        {"image": "a.jpg", "text": "Q?", "answer": "A"}, {"image": "b.jpg", "question": "Q?", "answers": ["A"],
         "description": "a hint"}, {**record("c.jpg"), "answer": None}]), [("c", "A")], {"unknown_format": "a.json#1"}),
    "Alpaca's template": ("a.json", dump([{"image": "a.jpg", "text": "Below is an instruction", "instruction": "Q",
                                           "output": "A"}]), [("a", "A")], {}),
    "line ends": ("a.json", dump([record("a.jpg", "A\r\nB\rC")]), [("a", "A\nB\nC")], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_that_people_have(case: str, tmp_path: Path) -> None:
    name, content, used, left_out = FILES[case]
    entries, counts = read(tmp_path, name, content, ("a.jpg", "b.jpg", "c.jpg", "d.jpg"))
    assert [(path.stem, *(c.text for c in entry.captions)) for entry, path in entries if path] == used
    assert counts.examples == left_out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "image,caption\n".encode("utf-16"), "a.csv is UTF-16; save it as UTF-8"),
        ("a.csv", b"image,caption,caption\na.jpg,A,B\n", "two columns 'caption'"),
        ("a.json", b'[{"image": "a.jpg", "caption": "A"},\n{"image": "b.jpg" "caption"}]', "not valid JSON.*line 2"),
        ("a.parquet", b"PAR1 no", "cannot be read as Parquet"),
    ],
)
def test_files_that_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, name, content, ("a.jpg",))


QUESTIONS = {
    "<image>\nWhich colour?\r\nAnswer in a word.": "Which colour?\nAnswer in a word.",
    "Which colour?\n<image>": "Which colour?",
    "Look at <image> here.": "Look at here.",
    "Say <|eot_id|>  twice.": "Say <|eot_id|>  twice.",
    "<image>": None,
}


@pytest.mark.parametrize("value", QUESTIONS)
def test_questions_keep_their_line_ends_and_lose_the_mark_of_the_image(value: str, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": value}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]
    rows = [talk(value, "A"), {**record("a.jpg"), "question": value}, {"images": ["a.jpg"], "messages": messages}]
    entries, _ = read(tmp_path, "a.jsonl", lines(*rows), ("a.jpg",))
    assert [entry.prompt for entry, _ in entries] == [QUESTIONS[value]] * 3


ALPACA = {"instruction": "Translate.", "output": "Hund."}
WHOLE = {
    "no input": ({**ALPACA, "input": ""}, "Translate."),
    "input": ({**ALPACA, "input": "dog\r\ncat"}, "Translate.\n\ndog\ncat"),
    "system text": ({**ALPACA, "system": "You are a poet."}, "system_text"),
    "earlier turns": ({**ALPACA, "history": [["Hi", "Hello"]]}, "earlier_turns"),
    "fields in other case": ({"Instruction": "Do.", "Input": "dog", "Output": "Hund."}, "Do.\n\ndog"),
    "no text": ({**ALPACA, "input": 5}, "not_a_text"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_the_whole_question_of_alpaca_is_asked(case: str, tmp_path: Path) -> None:
    """Of photographs and of texts: the template of Alpaca is the instruction, a blank line, the input."""
    row, expected = WHOLE[case]
    entries, counts = read(tmp_path, "a.jsonl", lines({"image": "a.jpg", **row}), ("a.jpg",))
    fields = {"prompt": "instruction", "response": "output"}
    items = list(Pairs(out="", files=str(tmp_path / "a.jsonl"), response_length=9, **fields).read(other := Counts()))
    if expected in (*counts, *other):
        assert (entries, items, counts[expected], other[expected]) == ([], [], 1, 1)
    else:
        assert [entry.prompt for entry, _ in entries] == [item.prompt for item in items] == [expected]


# --- the file of an image ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "names", "files"),
    [
        ((COCO,), [PLAIN, "42", "coco/train2014/" + PLAIN, "000000000042"], [COCO] * 4),
        ((PLAIN,), [COCO, "42", "coco/train2017/" + PLAIN, "val2014/" + COCO, "gqa/" + PLAIN], [PLAIN] * 4 + [None]),
        (("train2014/" + COCO,), ["train2014/" + PLAIN, PLAIN], ["train2014/" + COCO, None]),
        (("42.jpg", PLAIN), ["42", "43"], ["42.jpg", None]),
        (("a.JPG", "b.jpg", "C.jpg"), ["a.jpg", "b.JPG", "c.jpg", "b.png"], ["a.JPG", "b.jpg", None, None]),
        (("a.jpg", "a.png", "b.png"), ["a", "b"], [None, "b.png"]),
        (("a.jpg", "x/b.jpg"), ["vg/a.jpg", "x/b.jpg", "x/a.jpg", "b.jpg"], [None, "x/b.jpg", None, None]),
        (("a.jpg", "b.jpg"), ["data/a.jpg", "data/b.jpg", "/data/a.jpg"], [None, "b.jpg", None]),  # a.jpg has two names
        (("a.jpg", "b.jpg"), ["data/a.jpg", "b.jpg"], [None, "b.jpg"]),
        (("a.jpg", "b.jpg"), ["data/a.jpg", "data/b.jpg"], ["a.jpg", "b.jpg"]),
        (("dog#1.jpg", "a.jpg"), ["dog#1.jpg", "dog#1", "a.jpg#1", "a#1"], ["dog#1.jpg", "dog#1.jpg", "a.jpg", None]),
        (("a.jpg#1", "a.jpg"), ["a.jpg#0", "a.jpg#1", "a.jpg"], ["a.jpg", "a.jpg#1", "a.jpg"]),
        (("a.jpg", "x/b.jpg"), ["photos/a.jpg", "photos/x/b.jpg", "C:\\my\\photos\\a.jpg"], ["a.jpg", "x/b.jpg", None]),
    ],
)  # fmt: skip
def test_a_picture_is_found_or_missing_but_never_another_one(images, names, files, tmp_path):
    entries, counts = read(tmp_path, "a.jsonl", lines(*map(record, names)), images)
    paths = {entry.place: path.relative_to(tmp_path / "photos").as_posix() for entry, path in entries if path}
    places = [f"a.jsonl:{number}" for number in range(1, len(names) + 1)]
    assert [paths.get(place) for place in places] == files
    assert counts["missing_image"] + counts["ambiguous_image"] == files.count(None)


@pytest.mark.parametrize(("on_disk", "named"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_composed_and_decomposed_names_are_the_same(on_disk: str, named: str, tmp_path: Path) -> None:
    """The folder, too."""
    name = "\u00fcber/caf\u00e9.jpg"
    row = record(unicodedata.normalize(named, name))
    entries, counts = read(tmp_path, "a.jsonl", lines(row), (unicodedata.normalize(on_disk, name),))  # type: ignore[arg-type]
    assert len(entries) == 1 and not counts["missing_image"]


# --- the JSON reader against the json module -----------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
def test_json_is_read_alike_in_pieces_of_any_size(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "PIECE", piece)
    rows = [{"a": [1, -2.5e3, None], "b": 'x\\"\u00e9\n\U0001f600' * n, "c": {"d": [], "e": {}}} for n in range(6)]
    assert list(JsonText(io.StringIO(json.dumps(rows, indent=1))).elements()) == rows
    pairs = [
        ("a", 1, True),
        ("a", -2.5e3, True),
        ("a", None, True),
        ("b", rows[2]["b"], False),
        ("c", rows[2]["c"], False),
    ]
    assert list(JsonText(io.StringIO(json.dumps(rows[2]))).pairs()) == pairs
    (tmp_path / "a.jsonl").write_text("12\n" + lines(*rows) + '\n{"cut": "\n' + lines(*rows) + "\n3")
    counts = Counts()
    assert [row for _, row in read_records(tmp_path / "a.jsonl", counts)] == rows * 2
    assert counts.examples == {"broken_json": "a.jsonl:8", "not_a_record": "a.jsonl:1"}


def peak(path: Path) -> float:
    """Peak of Python's memory in MB while all records of a file are read."""
    tracemalloc.start()
    number = sum(1 for _ in read_records(path, Counts()))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number > 1000
    return most / 1e6


def generate(path: Path, megabytes: float) -> None:
    """Records of 2 kB each: a list, one JSON object, lines or a table."""
    caption, number = "A caption of some words. " * 80, int(megabytes * 500)
    rows = ({"image": f"coco/train2017/{n:012d}.jpg", "caption": caption} for n in range(number))
    with path.open("w") as file:
        if path.name == "list.json":
            file.write("[" + json.dumps(next(rows)))
            file.writelines("," + json.dumps(row) for row in rows)
            file.write("]")
        elif path.name == "coco.json":
            file.write('{"annotations": [{"image_id": -1, "caption": ""}')
            file.writelines("," + json.dumps({"image_id": n, "caption": caption}) for n in range(number))
            file.write('], "images": [{"id": 1, "file_name": "1.jpg"}]}')
        elif path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            file.write("image,caption\n")
            file.writelines(f'{row["image"]},"{row["caption"]}"\n' for row in rows)


@pytest.mark.parametrize("name", ["list.json", "coco.json", "lines.jsonl", "table.csv"])
@pytest.mark.parametrize(
    "megabytes", [pytest.param(20, id="20MB"), pytest.param(200, id="200MB", marks=pytest.mark.slow)]
)
def test_memory_does_not_grow_with_the_file(name: str, megabytes: int, tmp_path: Path) -> None:
    generate(tmp_path / name, megabytes)
    assert (tmp_path / name).stat().st_size > 0.9e6 * megabytes
    assert peak(tmp_path / name) < 8


# --- Parquet, base64 ----------------------------------------------------------------------------------


def encoded(colour: Any) -> bytes:
    Image.new("RGB", (4, 4), colour).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("form", ["struct", "binary", "base64", "bytes"])
def test_parquet_with_images(form: str, tmp_path: Path) -> None:
    """Each picture keeps its captions, though all have the same name."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    colours = ["red", "lime", "blue", "white"] * 10
    images: list[Any] = [encoded(colour) for colour in colours]
    columns: dict[str, list] = {"GT_A": [f"All {colour}." for colour in colours], "GT_B": [f"{n}" for n in range(40)]}
    if form == "struct":
        columns["image"] = [{"bytes": data, "path": "x.png"} for data in images]
    elif form == "bytes":
        columns["image"] = images
    else:
        columns["binary"] = images if form == "binary" else [base64.b64encode(data).decode() for data in images]
        columns["image"] = ["x.png"] * 40
    columns["caption"] = ["a model's"] * 40  # not asked for
    num_without = 1 if form == "struct" else 0
    if num_without:  # a row of which only the name is there
        for name, value in (
            ("image", {"bytes": None, "path": "y.png"}),
            ("GT_A", "?"),
            ("GT_B", "?"),
            ("caption", "?"),
        ):
            columns[name].insert(5, value)
    parquet.write_table(pyarrow.table(columns), tmp_path / "a-0.parquet", row_group_size=7)
    source = {"annotations": str(tmp_path / "a-*.parquet"), "captions": ["GT_A", "GT_B"], "prompt": "Q"}
    settings = {"image_size": 4, "response_length": 32, "prompt": "", "vocab_size": 300, "encoding": "png"}
    index = Photos(out=str(tmp_path / "out"), sources={"caps": source}, **settings).run()
    without = {"no_image": num_without} if num_without else {}
    assert index["counts"]["records"] == {
        "records": 40 + num_without, "merged": 36, "duplicate_caption": 36, **without
    }  # fmt: skip
    samples = [s for tar in (tmp_path / "out").rglob("*.tar") for s in read_shard(tar)]
    assert len(samples) == 4
    for sample in samples:
        row, image = sample["json"], Image.open(io.BytesIO(sample["png"]))
        (_, colour), *more = image.getcolors() or ()
        texts = [caption["text"] for caption in row["captions"]]
        name = next(name for name in colours if Image.new("RGB", (1, 1), name).getpixel((0, 0)) == colour)
        assert not more and row["prompt"] == "Q"
        assert texts == [f"All {name}.", *(f"{n}" for n in range(40) if colours[n] == name)]


def test_pictures_of_one_name_in_parquet_are_split_by_their_content(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": encoded((n, n, n)), "path": "image.png"} for n in range(60)]
    coco = [{"bytes": encoded((n, n, 99)), "path": COCO} for n in range(2)]  # one picture, in two qualities
    table = pyarrow.table({"image": images + coco, "caption": [f"{n}." for n in range(62)]})
    parquet.write_table(table, tmp_path / "a.parquet")
    settings = {"image_size": 4, "response_length": 16, "prompt": "", "vocab_size": 300, "encoding": "png"}
    photos = list(Photos(out="", annotations=str(tmp_path / "a.parquet"), **settings).read(Counts()))
    assert len({photo.name for photo in photos[:60]}) == 60 and len({photo.split for photo in photos[:60]}) > 1
    assert {photo.name for photo in photos[60:]} == {COCO.removeprefix("COCO_val2014_").removesuffix(".jpg")}


def test_only_names_of_files_need_their_folder(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(dump([record("a.jpg")]))
    with pytest.raises(UserError, match=r"names the image file a\.jpg: set `images` to its folder"):
        list(Source(annotations=str(tmp_path / "a.json")).read(Counts(), seed=0))


def test_the_name_of_an_annotation_file_must_be_utf_8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.json")).write_text(dump([record("a.jpg")]))
    with pytest.raises(UserError, match=r"caf\\udce9.json' is not UTF-8: rename it"):
        Source(annotations=str(tmp_path / "*.json")).files()
    with pytest.raises(UserError, match=r"prepare.annotations: cannot read 'caf\\udce9.json' as yaml"):
        load_config(["conf=photos", "prepare.images=x", os.fsdecode(b"prepare.annotations=caf\xe9.json")])


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[data\]'"):
        read(tmp_path, "a.parquet", b"PAR1", ("a.jpg",))


# --- several sources ----------------------------------------------------------------------------------


def three_sources(folder: Path) -> dict[str, dict]:
    """Sources whose image 0.jpg is another picture in each; the third one is limited."""
    for name, colour in (("one", "red"), ("two", "lime"), ("three", "blue")):
        for number in range(8):
            picture(folder / name / f"{number}.jpg", colour)
        rows = [record(f"{number}.jpg", f"{name} {number}.") for number in range(8)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    sources = {
        name: {"annotations": str(folder / f"{name}.json"), "images": str(folder / name)}
        for name in ("one", "two", "three")
    }
    sources["one"] |= {"prompt": "First?", "weight": 2.0, "licence": "CC BY-NC 4.0", "origin": "somewhere"}
    sources["three"] |= {"max": 3}
    return sources


def test_each_source_has_its_own_images_prompt_and_licence(tmp_path: Path) -> None:
    sources = three_sources(tmp_path)
    settings = {"image_size": 8, "response_length": 32, "prompt": "Any?", "vocab_size": 300, "per_shard": 4}
    index = Photos(out=str(tmp_path / "out"), sources=sources, **settings).run()
    assert index["sources"][0] == {"name": "one", "weight": 2.0, "licence": "CC BY-NC 4.0", "origin": "somewhere"}
    assert [source["name"] for source in index["sources"]] == ["one", "two", "three"]
    assert index["counts"]["records"] == {"records": 24, "over_max": 5}
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(row["source"], row["reason"]) for row in rejects] == [("three", "over_max")] * 5
    assert len({row["place"] for row in rejects}) == 5
    origins, splits = [], {}
    for split in ("train", "val", "test"):
        entries = json.loads((tmp_path / "out" / split / "index.json").read_text())["shards"]
        for entry in entries:
            for sample, origin in zip(
                read_shard(tmp_path / "out" / split / entry["name"]), entry["source"], strict=True
            ):
                row, pixel = sample["json"], Image.open(io.BytesIO(sample["jpg"])).getpixel((4, 4))
                name, number = row["captions"][0]["text"].split()
                assert row["prompt"] == ("First?" if name == "one" else "Any?")
                assert name == ["one", "two", "three"][origin] and max(range(3), key=pixel.__getitem__) == origin
                assert splits.setdefault(number, split) == split  # pictures of one name share it, wherever they are
                origins.append(origin)
    assert [origins.count(n) for n in range(3)] == [8, 8, 3]


def test_a_split_that_is_given_counts_for_all_prompts_of_an_image(tmp_path: Path) -> None:
    rows = []
    for number in range(18):
        picture(tmp_path / f"{number}.jpg")
        given, none = {"split": "test"}, {}
        splits = [none, none] if number >= 12 else [given, none] if number % 2 else [none, given]
        rows += [{**record(f"{number}.jpg"), "prompt": q, **split} for q, split in zip("QR", splits, strict=True)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    settings = {"image_size": 8, "response_length": 32, "prompt": "Q", "vocab_size": 300, "images": str(tmp_path)}
    Photos(out=str(tmp_path / "out"), annotations=str(tmp_path / "a.json"), **settings).run()
    places: dict[str, list[str]] = {}
    for tar in (tmp_path / "out").rglob("*.tar"):
        for sample in read_shard(tar):
            places.setdefault(sample["__key__"].split("-")[0], []).append(tar.parent.name)
    assert {len(split) for split in places.values()} == {2} and len(places) == 18
    assert all(len(set(split)) == 1 for split in places.values())
    assert all(places[f"{number}"][0] == "test" for number in range(12))


def test_a_picture_in_two_splits_under_two_prompts_or_sources_stays_in_the_first(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / f"{number}.jpg")
    rows = [{**record("0.jpg"), "prompt": q, "split": split} for q, split in (("Q", "test"), ("R", "train"))]
    (tmp_path / "a.json").write_text(json.dumps([*rows, {**record("1.jpg"), "split": "train"}]))
    (tmp_path / "b.json").write_text(json.dumps([{**record(f"{n}.jpg"), "split": "test"} for n in range(3)]))
    sources = {name: {"annotations": str(tmp_path / f"{name}.json"), "images": str(tmp_path)} for name in "ab"}
    settings = {"image_size": 8, "response_length": 32, "prompt": "Q", "vocab_size": 300}
    index = Photos(out=str(tmp_path / "out"), sources=sources, **settings).run()
    tars = [(tar.parent.name, tar) for tar in (tmp_path / "out").rglob("*.tar")]
    places = sorted((split, sample["__key__"].split("-")[0]) for split, tar in tars for sample in read_shard(tar))
    assert places == [("test", "0"), ("test", "0"), ("test", "2"), ("train", "1")]
    assert index["counts"]["records"]["image_in_two_splits"] == 2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["records"] == {"read": 6, "rejected": 2, "over_max": 0, "merged": 0, "kept": 4}
    assert [source["left_out"]["records"]["image_in_two_splits"]["count"] for source in manifest["sources"]] == [1, 1]


def test_coco_ids_join_as_text_and_never_become_file_names(tmp_path: Path) -> None:
    tables = {
        "images": [{"id": 1, "file_name": "3.jpg"}, {"id": 2, "file_name": "1.jpg"}, {"id": 4, "file_name": "1.jpg"}],
        "annotations": [
            {"image_id": "1", "caption": "Three."},
            {"image_id": 2, "caption": "One."},
            {"image_id": 3, "caption": "Of no image."},
            {"image_id": [1], "caption": "Odd."},
        ],
    }
    entries, counts = read(tmp_path, "a.json", json.dumps(tables), ("1.jpg", "2.jpg", "3.jpg"))
    assert {(path.name, entry.captions[0].text) for entry, path in entries} == {("3.jpg", "Three."), ("1.jpg", "One.")}
    assert counts["no_image"] == 2


@pytest.mark.parametrize(
    ("revise", "captions"),
    [
        ('[{"org": "dog", "target": "cat"}]', ["A cat sits."]),
        ({"org": "dog", "target": "cat"}, ["A cat sits."]),
        ([], ["A dog sits."]),
        (None, []),
        ("right", []),
    ],
)
def test_a_draft_is_never_trained_without_its_edits(revise: Any, captions: list[str], tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>Q?"}, {"from": "gpt", "value": "A dog sits."}]
    content = lines({"image": "a.jpg", "conversations": turns, "revise": revise})
    entries, counts = read(tmp_path, "a.jsonl", content, ("a.jpg",))
    assert [entry.captions[0].text for entry, _ in entries] == captions
    assert counts["revise_not_a_list"] == 1 - len(captions)


def test_a_name_that_leaves_the_folder_is_missing(tmp_path: Path) -> None:
    picture(tmp_path / "other" / "a.jpg")
    names = ["../a.jpg", str(tmp_path / "other" / "a.jpg"), "sub/../a.jpg", "b/../../a.jpg"]
    entries, counts = read(tmp_path, "a.jsonl", lines(*map(record, names)), ("a.jpg", "sub/a.jpg"))
    assert [path.relative_to(tmp_path / "photos").as_posix() for _, path in entries] == ["a.jpg"]
    assert counts["missing_image"] == 3


def test_a_limit_takes_the_same_records_from_all_parts_of_a_source(tmp_path: Path) -> None:
    rows = [record("a.jpg", f"{n}") for n in range(400)]
    entries, counts = read(tmp_path, "a.jsonl", lines(*rows), ("a.jpg",), max=100)
    taken = [int(entry.captions[0].text) for entry, _ in entries]
    assert len(taken) == 100 and counts["over_max"] == 300
    assert all(10 < len([n for n in taken if start <= n < start + 100]) < 45 for start in (0, 100, 200, 300))
    source = Source(annotations=str(tmp_path / "a.jsonl"), images=str(tmp_path / "photos"), max=100)
    assert [int(entry.captions[0].text) for entry, _ in source.read(Counts(), seed=0)] == taken
    assert [int(entry.captions[0].text) for entry, _ in source.read(Counts(), seed=1)] != taken


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": "x"}, "prepare.sources.one has no key 'image'; it may have annotations, images"),
        ({"images": "x"}, "prepare.sources.one.annotations must be given"),
        ({"annotations": "a.json", "weight": 0}, "weight must be a positive number, got 0"),
        ({"annotations": "a.json", "weight": math.inf}, "weight must be a positive number, got inf"),
        ({"annotations": "a.json", "weight": math.nan}, "weight must be a positive number, got nan"),
        ({"annotations": "a.json", "max": 0.5}, "max must be a positive whole number, got 0.5"),
        ({"annotations": "none-*.json"}, "no file none-"),
        ({"annotations": "a.json", "images": "none"}, "no image folder none"),
    ],
)
def test_wrong_sources_are_named(values: dict, message: str, tmp_path: Path) -> None:
    settings = {"image_size": 8, "response_length": 32, "prompt": "Q", "vocab_size": 300}
    with pytest.raises(UserError, match=message):
        Photos(out=str(tmp_path / "out"), sources={"one": values}, **settings).run()
    with pytest.raises(UserError, match=r"either prepare\.annotations=FILE"):
        Photos(out=str(tmp_path / "out"), annotations="a.json", sources={"one": values}, **settings).run()


def test_the_recipe_of_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files and three folders, each under its licence, with the sizes of the paper."""
    arguments = [f"prepare.tokenizer={tmp_path}", "prepare.sources.vicrit.annotations=vicrit.json"]
    dataset = build(load_config(["conf=data/rediff_260k", *arguments]).prepare)
    sources = dataset.source_list
    assert {source.name: source.max for source in sources} == {
        "vicrit": 160_000,
        "sharegpt4v": 80_000,
        "llava_1_5": 20_000,
    }
    assert len({source.images for source in sources}) == len({*dataset.inputs} - {s.images for s in sources}) == 3
    assert "CC BY-NC 4.0" in {source.name: source.licence or "" for source in sources}["sharegpt4v"]
    assert all(source.licence and source.origin and source.weight == 1 for source in sources)
