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
from src.evaluation.benchmarks import CapArena, CapMAS, Coco, DetailCaps, PopeQuestions, Scenes
from src.evaluation.calibration import calibration_text
from src.evaluation.captions import match
from src.evaluation.scores import check_protocols
from src.io.errors import UserError
from src.judges.base import Item
from src.metrics.caparena import BASELINES
from src.prepare import main as prepare
from src.text.captions import read_captions
from testing.servers.scripted import Request, Scripted, reply
from tests.benchmarks import NUM, captions_file, write_caparena, write_capmas, write_images

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


def test_chair_of_coco(tmp_path, capsys):
    """Two of three images; a caption names a cat that is not there."""
    raw = tmp_path / "raw"
    write_images(raw / "images", [f"COCO_val2014_{n:012}" for n in (7, 8, 9)])
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012}.jpg"} for n in (7, 8, 9)]
    people = [{"image_id": n, "caption": f"Picture {n}."} for n in (7, 8, 9, 7)]
    (raw / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": people}))
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    things = [{"image_id": n, "category_id": 1} for n in (7, 8, 9)]
    content = {"images": images, "annotations": things, "categories": categories}
    (raw / "instances_val2014.json").write_text(json.dumps(content))
    (raw / "synonyms.txt").write_text("dog, puppy\ncat\n")
    (raw / "subset.txt").write_text("9\n7\n")
    items = Coco(folder=str(raw), subset=str(raw / "subset.txt")).items()
    assert [(item.key, item.references) for item in items] == [
        ("9", ("Picture 9.",)),
        ("7", ("Picture 7.", "Picture 7.")),
    ]
    (tmp_path / "mine.json").write_text(json.dumps({"COCO_val2014_000000000007.jpg": "A cat.", "9": "Two puppies."}))
    settings = [f"captions={tmp_path}/mine.json", f"evaluate.data.folder={raw}", f"evaluate.out={tmp_path}/out"]
    main(["conf=eval/chair", *settings, f"evaluate.data.subset={raw}/subset.txt"])
    stats = json.loads((tmp_path / "out" / "scores.json").read_text())["mine"]["stats"]
    assert (stats["chair_s"]["mean"], stats["chair_i"]["mean"], stats["chair_recall"]["mean"]) == (0.5, 0.5, 0.5)
    (raw / "subset.txt").write_text("10\n")
    with pytest.raises(UserError, match="has no image 10"):
        Coco(folder=str(raw), subset=str(raw / "subset.txt")).items()


def test_pope(tmp_path):
    raw = tmp_path / "raw"
    write_images(raw / "images", ["a", "b"])
    rows = [
        {"question_id": n, "image": f"{'ab'[n % 2]}.jpg", "text": f"Is there {n}?", "label": "yes"} for n in (1, 2, 3)
    ]
    (raw / "coco_pope_random.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    items = PopeQuestions(folder=str(raw)).items()
    assert [(item.key, item.extra["prompt"]) for item in items] == [(str(n), f"Is there {n}?") for n in (1, 2, 3)]
    (tmp_path / "mine.jsonl").write_text(
        '{"key": 1, "text": "Yes."}\n{"key": 3, "text": "No"}\n{"key": 2, "text": "yes"}\n'
    )
    settings = [f"captions={tmp_path}/mine.jsonl", f"evaluate.data.folder={raw}", f"evaluate.out={tmp_path}/out"]
    main(["conf=eval/pope", *settings])
    stats = json.loads((tmp_path / "out" / "scores.json").read_text())["mine"]["stats"]
    assert stats["pope_accuracy"]["mean"] == pytest.approx(2 / 3) and stats["pope_recall"]["mean"] == pytest.approx(
        2 / 3
    )


def test_scenes(tmp_path):
    """Exact scores of any system's captions of a prepared split: the true ones, and none for the last image."""
    sizes = [f"prepare.num_{split}=3" for split in ("train", "val", "test")]
    prepare(["conf=scenes", f"prepare.out={tmp_path}/scenes", "prepare.processes=1", *sizes])
    items = Scenes(folder=str(tmp_path / "scenes")).items()
    assert len(items) == 3 and Image.open(items[2].image).size == (48, 48)  # pyright: ignore[reportArgumentType]
    (tmp_path / "mine.json").write_text(json.dumps({item.key: item.references[0] for item in items[:2]}))
    settings = [
        f"captions={tmp_path}/mine.json",
        f"evaluate.data.folder={tmp_path}/scenes",
        f"evaluate.out={tmp_path}/out",
    ]
    main(["conf=eval/scenes", *settings, "evaluate.max_failed=0.5"])
    row = json.loads((tmp_path / "out" / "scores.json").read_text())["mine"]
    assert row["stats"]["factuality"] == {"mean": 1.0, "se": 0.0, "n": 2} and row["counts"]["clair"]["no_caption"] == 1


def test_what_is_missing_is_named_with_the_command_that_gets_it(tmp_path, capsys):
    for data, words in (
        (CapMAS, "no data.jsonl, COVERAGE_TEST_VQA, images; get them with\n  git clone https://github.com/adobe-"),
        (CapArena, "no caparena_auto_600.json, images; get them with\n  git clone"),
        (DetailCaps, "no DetailCaps-4870.parquet; get them with\n  hf download --repo-type dataset foundation-"),
        (Coco, "no captions_val2014.json, images; get them with\n  curl -L http://images.cocodataset.org/zips/val2014"),
        (
            PopeQuestions,
            "no coco_pope_random.json, images; get them with\n  git clone https://github.com/RUCAIBox/POPE",
        ),
        (Scenes, "no test; get them with\n  python -m src.prepare conf=scenes prepare.out="),
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


def test_a_whole_name_comes_before_a_part_of_another(tmp_path):
    items = [Item(key=key, row=row, caption=None) for row, key in enumerate(["a", "x/a", "y/b", "z/b"])]
    texts = {"a": "1", "x/a.jpg": "2", "b": "of either"}
    (tmp_path / "mine.json").write_text(json.dumps(texts))
    matched, unknown = match(items, read_captions(tmp_path / "mine.json"), tmp_path / "mine.json")
    assert [item.caption for item in matched] == ["1", "2", None, None] and unknown == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"key": "a"}', "has none of text, caption"),
        ("a.jsonl", '{"key": "a", "text": "x"}\n{', "line 2, "),
        ("a.jsonl", '{"key": "a", "text": null}', "the caption of 'a' is None, not a text"),
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


def test_rows_of_other_runs_join_the_table_if_they_were_made_alike(tmp_path, capsys):
    def judges(request: Request):
        return reply('{"score": 60, "reason": "r"}')

    write_capmas(tmp_path / "raw")
    only = ["evaluate.judges.coverage=null", "evaluate.judges.factuality=null", "judge.key_env=null"]
    common = ["conf=eval/capmas", f"evaluate.data.folder={tmp_path}/raw", *only]
    files = {name: captions_file(tmp_path / f"{name}.jsonl") for name in ("one", "two")}
    files["two"].write_text(files["two"].read_text().replace("A picture", "Some picture"))
    with Scripted(judges) as server:
        for name, judge in (("one", "m"), ("two", "m"), ("two", "n")):
            run = [f"captions={files[name]}", f"judge.model={judge}", f"judge.base_url={server.url}"]
            run += [f"evaluate.out={tmp_path}/{name}-{judge}", "stages=[judge,score]"]
            main([*common, *run])
    capsys.readouterr()
    command = [*common, f"captions={files['one']}", "judge.model=m", "stages=[score]", f"evaluate.out={tmp_path}/one-m"]
    main([*command, f"evaluate.also=[{tmp_path}/two-m/scores.json]"])
    table = capsys.readouterr().out
    assert "| one    | 60.00" in table and "| two    | 60.00" in table and "prompt Describe it.; length 64" in table
    with pytest.raises(SystemExit):
        main([*command, f"evaluate.also=[{tmp_path}/two-n/scores.json]"])
    assert "two does not belong in one table with one (judge.model: m in one, n now)" in capsys.readouterr().err


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
    assert "| mine   | 60.00 ± " in capsys.readouterr().out


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
    line = next(line for line in text.splitlines() if line.startswith(f"| {metric} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


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
