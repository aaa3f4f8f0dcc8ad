"""The files of the papers' benchmarks, captions of any system, what may stand in one table, and calibration."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from src.evaluate import main
from src.evaluation.benchmarks import CapArena, CapMAS, DetailCaps
from src.evaluation.calibration import calibration_text
from src.evaluation.captions import match
from src.evaluation.scores import check_protocols
from src.io.errors import UserError
from src.metrics.caparena import BASELINES
from src.text.captions import read_captions
from testing.servers.scripted import Request, Scripted, reply
from tests.benchmarks import NUM, write_caparena, write_capmas

# data


def test_capmas(tmp_path):
    items = CapMAS(folder=str(write_capmas(tmp_path / "raw"))).items()
    assert [item.row for item in items] == list(range(NUM))
    assert items[2].key == "aar_test_04602" and items[2].references == ("A reference of picture 2.",)
    assert items[2].image == tmp_path / "raw" / "images" / "deep" / "aar_test_04602.jpg"
    assert items[2].extra["questions"][0] == "Which?\nA) one\nB) two" and items[2].extra["answers"] == ["A", "B"]


def test_caparena(tmp_path):
    items = CapArena(folder=str(write_caparena(tmp_path / "raw"))).items()
    assert [item.extra["baseline"] for item in items] == [0, 1, 2, 0, 1]
    assert items[1].extra["rival"] == f"{BASELINES[1]} on 1." and items[1].references == ("Picture 1.",)
    file = tmp_path / "raw" / "caparena_auto_600.json"
    file.write_text(file.read_text().replace(f'"ref_model": "{BASELINES[1]}"', '"ref_model": "cog"'))
    with pytest.raises(UserError, match=r"test_00001\.jpg is against 'cog'"):
        CapArena(folder=str(tmp_path / "raw")).items()


def test_detailcaps(tmp_path):
    encoded = []
    for size in (8, 9, 10):
        stream = io.BytesIO()
        Image.new("RGB", (size, size)).save(stream, "JPEG")
        encoded.append(stream.getvalue())
    references = {name: [f"{name} {n}" for n in range(3)] for name in DetailCaps.references}
    rows = {"image": ["coco/a.jpg", "https://x/b.png", "c"], "binary": encoded, "source": ["s"] * 3, **references}
    pq.write_table(pa.table(rows), tmp_path / "DetailCaps-4870.parquet")
    items = DetailCaps(folder=str(tmp_path)).items()
    assert [item.key for item in items] == rows["image"]
    assert items[1].references == tuple(f"{name} 1" for name in DetailCaps.references)
    assert [Image.open(item.image).size[0] for item in items if item.image] == [8, 9, 10]
    pq.write_table(
        pa.table({**rows, "binary": [base64.b64encode(b).decode() for b in encoded]}), tmp_path / "b64.parquet"
    )
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    again = DetailCaps(folder=str(tmp_path), file="b64.parquet")
    assert [Image.open(item.image).size[0] for item in again.items() if item.image] == [8, 9, 10]
    assert again.digest != DetailCaps(folder=str(tmp_path)).digest


def test_what_is_missing_is_named_with_the_command_that_gets_it(tmp_path, capsys):
    for data, words in (
        (CapMAS, "no data.jsonl, COVERAGE_TEST_VQA, images; get them with\n  git clone https://github.com/adobe-"),
        (CapArena, "no caparena_auto_600.json, images; get them with\n  git clone"),
        (DetailCaps, "no DetailCaps-4870.parquet; get them with\n  hf download --repo-type dataset foundation-"),
    ):
        with pytest.raises(UserError, match=words):
            data(folder=str(tmp_path / "nowhere")).items()
    write_capmas(tmp_path / "raw")
    (tmp_path / "raw" / "images" / "deep" / "aar_test_04603.jpg").unlink()
    with pytest.raises(SystemExit):
        main(
            [
                *("conf=eval/capmas", "captions=x.jsonl", "judge.model=m"),
                *(f"evaluate.data.folder={tmp_path}/raw", f"evaluate.out={tmp_path}/out"),
            ]
        )
    assert f"{tmp_path}/raw/images lacks 1 of 5 images, aar_test_04603 among them" in capsys.readouterr().err


# captions


def test_captions_in_every_form_find_their_images(tmp_path):
    items = CapMAS(folder=str(write_capmas(tmp_path / "raw"))).items()
    names = [item.key for item in items]
    forms = {
        "capmas.json": {f"{name}.jpg": f"text {n}" for n, name in enumerate(names)},
        "records.json": [{"image_id": name, "caption": f"text {n}"} for n, name in enumerate(names)],
        "lines.jsonl": [{"image": f"deep/{name}.jpg", "response": f" text {n}"} for n, name in enumerate(names)],
    }
    for file, content in forms.items():
        text = "\n".join(map(json.dumps, content)) if file.endswith("l") else json.dumps(content)
        (tmp_path / file).write_text(text)
        matched, unknown = match(items, read_captions(tmp_path / file), tmp_path / file)
        assert [item.caption for item in matched] == [f"text {n}" for n in range(NUM)] and unknown == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"key": "a"}', "cannot be read as"),
        ("a.jsonl", "{", "cannot be read as"),
        ("a.json", "[1]", "cannot be read as"),
        ("a.json", '{"a": 3}', "cannot be read as"),
        ("a.jsonl", '{"key": "a", "text": "x"}\n{"key": "a", "text": "y"}', "has two captions of 'a'"),
        (
            "a.jsonl",
            '{"key": "a", "text": "", "length": 64}\n{"key": "b", "text": "", "length": 32}',
            "mixes values of le",
        ),
        ("a.json", '{"other.jpg": "x"}', "is about other images: it has 'other.jpg', the benchmark 'aar_test_04600'"),
        ("a.json", '{"aar_test_04600.jpg": "x", "aar_test_04600": "y"}', "has two captions of 'aar_test_04600'"),
    ],
)
def test_caption_files_of_no_use(tmp_path, name, content, words):
    items = CapMAS(folder=str(write_capmas(tmp_path / "raw"))).items()
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        match(items, read_captions(tmp_path / name), tmp_path / name)


# tables


def row(**changed) -> dict:
    judge = {"model": "a", "seed": None}
    return {"protocol": {"images": [5, "x"], "judge": judge, "prompt": "p", "length": 128, "served": ["s"], **changed}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": [4, "x"]}, "images"),
        ({"judge": {"model": "b", "seed": None}}, "judge.model: a in ours, b now"),
        ({"prompt": "q"}, "prompt: p in ours, q now"),
        ({"length": 64}, "length: 128 in ours, 64 now"),
        ({"served": ["t"]}, "served"),
    ],
)
def test_one_table_has_one_protocol(change, words):
    check_protocols({"ours": row(), "same": row(), "unstated": row(prompt=None, length=None, served=[])})
    with pytest.raises(UserError, match=rf"theirs does not belong in one table with ours \(.*{words}"):
        check_protocols({"ours": row(), "theirs": row(**change)})


def test_battles_end_to_end(tmp_path, capsys):
    """A judge that prefers the caption under test if it is about an even picture, and the first one otherwise."""

    def judges(request: Request):
        first = request.text.split("Caption 1:\n")[1]
        even = any(f"number {n}." in request.text for n in (0, 2, 4))
        mine_is_first = first.startswith("Mine")
        winner = 1 if not even or mine_is_first else 2
        return reply(f"Reason: so.\nJudgment: Caption {winner} is better")

    write_caparena(tmp_path / "raw")
    texts = {f"test_0000{n}.jpg": f"Mine, number {n}." for n in range(NUM)}
    (tmp_path / "mine.json").write_text(json.dumps(texts))
    with Scripted(judges) as server:
        judge = ["judge.model=m", f"judge.base_url={server.url}", "judge.key_env=null"]
        paths = [f"captions={tmp_path}/mine.json", f"evaluate.data.folder={tmp_path}/raw"]
        main(["conf=eval/caparena", *paths, *judge, f"evaluate.out={tmp_path}/out"])
        assert len(server.requests) == 2 * NUM
        content = server.requests[0].body["messages"][1]["content"]
        assert content[0]["image_url"]["detail"] == "high"
    stats = json.loads((tmp_path / "out" / "scores.json").read_text())["mine"]["stats"]
    assert stats["caparena"]["mean"] == pytest.approx(60.0)  # three wins, two ties
    assert stats["caparena_consistency"]["mean"] == pytest.approx(0.6)
    assert stats[f"caparena_{BASELINES[2]}"]["mean"] == pytest.approx(0.5)  # one win of 200
    assert "| mine | 60.00 ± " in capsys.readouterr().out


# calibration


def lines(metric: str, values: dict[str, list[float]]) -> list[dict]:
    return [
        {"system": system, "key": f"k{n}", "metric": metric, "value": value}
        for system, some in values.items()
        for n, value in enumerate(some)
    ]


def write(path: Path, content: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in content))
    return path


def cells(text: str, metric: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(f"| {metric} ")).strip("| ").split(" | ")


def test_a_calibration_says_how_the_scale_moves(tmp_path):
    old = {"a": [0.2, 0.4], "b": [0.5, 0.7], "c": [0.8, 0.9]}
    new = {"a": [0.1, 0.35], "b": [0.45, 0.5], "c": [0.7, 0.95]}
    battles = {"a": [100, 0, -100, -100]}, {"a": [50, 0, 100, -100]}
    old_file = write(
        tmp_path / "old.jsonl", [*lines("clair", old), *lines("caparena", battles[0]), *lines("coverage", old)]
    )
    text = calibration_text(old_file, [*lines("clair", new), *lines("caparena", battles[1])])
    shifts = [-0.1, -0.05, -0.05, -0.2, -0.1, 0.05]
    mean = sum(shifts) / 6
    error = (sum((s - mean) ** 2 for s in shifts) / 5 / 6) ** 0.5
    assert cells(text, "clair") == [
        "clair", "6", "0.5833", "0.5083", f"{mean:+.4g} ± {error:.2g}", "1.000", "1.000", "0.833",
    ]  # fmt: skip
    # ranks of old 4, 3, 1.5, 1.5 and new 3, 2, 4, 1: by the definition of Spearman's correlation with ties
    assert cells(text, "caparena")[5:] == ["0.105", "", "0.750"]
    assert "coverage" not in text
