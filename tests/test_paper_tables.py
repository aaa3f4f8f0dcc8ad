"""The papers' tables: numbers, errors and refusals against closed forms, and the files of runs that took place."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from src.evaluate import main
from src.evaluation.captions import edit_marks
from src.evaluation.paper_tables import PUBLISHED, PaperTables
from src.io.errors import UserError
from tests.benchmarks import NUM, captions_file, write_capmas

GOLDEN = Path(os.environ.get("GOLDEN_EVAL") or Path(__file__).parent / "golden" / "eval")
COLUMNS = {"CLAIR": "clair", "CapArena-Auto": "caparena"}
IMAGES = 40


def test_golden_eval_published():
    """What the report prints as published is what the paper's tables say."""
    golden = json.loads((GOLDEN / "published_rediff.json").read_text(encoding="utf-8"))
    tables = {name: table for name, table in golden.items() if name.startswith("table")}
    assert json.loads(PUBLISHED.read_text(encoding="utf-8"))["tables"] == tables


def values_of(system: str) -> list[float]:
    """Invented values of the images, which are easy and hard for all systems alike."""
    shift = sum(map(ord, system)) % 7 / 50
    return [0.3 + shift + 0.3 * math.sin(n) + 0.02 * math.cos(n * len(system)) for n in range(IMAGES)]


def stat_of(values: list[float]) -> dict:
    mean = sum(values) / len(values)
    return {"mean": mean, "se": math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)),
            "n": len(values)}  # fmt: skip


def write_run(folder: Path, systems: dict[str, int | None], *, metric: str = "clair", **protocol) -> Path:
    """The files of a benchmark's stage `score`. systems: tokens per step by name"""
    folder.mkdir(parents=True)
    shared = {"benchmark": "CapMAS", "images": [IMAGES, "x"], "judge": {"model": "j"}, "metrics": {metric: {}}}
    shared |= {"prompt": "p", "length": 128, "served": []}
    scores, verdicts = {}, []
    for name, speed in systems.items():
        forwards = None if speed is None else {"mean": 128 / speed, "se": 0.5, "n": IMAGES}
        scores[name] = {
            "stats": {metric: stat_of(values_of(name)), f"{metric}_official": {"mean": 0.5, "se": None, "n": IMAGES}},
            "counts": {metric: {"ok": IMAGES}}, "served": [], "judged": None, "protocol": {**shared, **protocol},
            "captions": {"sha256": name, "other_images": 0, "cleaned": 0},
            "speed": {"tokens_per_step": speed, "forwards": forwards},
        }  # fmt: skip
        lines = enumerate(values_of(name))
        verdicts += [{"system": name, "key": f"k{n}", "metric": metric, "value": v, "weight": 1.0} for n, v in lines]
    item = {"image": None, "references": [], "captions": dict.fromkeys(systems, "A cat."), "edits": {}}
    items = [{"key": f"k{n}", **item} for n in range(IMAGES)]
    (folder / "scores.json").write_text(json.dumps(scores))
    for name, rows in (("verdicts", verdicts), ("items", items)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def report_of(out: Path, *runs: Path, **settings) -> tuple[str, dict]:
    given = {"columns": COLUMNS, "rows": {"ours": ["ReDiff", "online round 1"]}, **settings}
    text = PaperTables(runs=[str(run) for run in runs], out=str(out), **given).run()
    return text, json.loads((out / "report.json").read_text())


def lines_of(content: dict, table: str) -> list[tuple[str, str]]:
    return [(line["row"], line["source"]) for line in content["tables"][table]]


def test_measured_rows_stand_beside_the_published_ones(tmp_path):
    speeds = {f"ours-{n}": n for n in (1, 4)} | {"qwen": None, "other-2": 2}
    text, content = report_of(tmp_path / "out", write_run(tmp_path / "run", speeds))
    table1 = lines_of(content, "table1")
    assert table1[table1.index(("ReDiff", "published")) + 1 :] == [("ours", "measured"), ("qwen", "measured")]
    assert lines_of(content, "table2")[-3:] == [("ours", "measured"), ("qwen", "measured"), ("other", "measured")]
    assert ("ours", "measured") in lines_of(content, "table6")  # set beside a row of it, as the others are not
    assert all(source == "published" for _, source in lines_of(content, "table4"))
    ours = next(line for line in content["tables"]["table6"] if line["row"] == "ours")["values"]["CLAIR"]
    expected = {speed: stat_of(values_of(f"ours-{speed}")) for speed in ("1", "4")}
    for speed, stat in expected.items():
        assert ours[speed] == {
            "mean": pytest.approx(100 * stat["mean"]),
            "se": pytest.approx(100 * stat["se"]),
            "n": 40,
        }
    assert f"{ours['4']['mean']:.2f} ± {ours['4']['se']:.2f}" in text and "76.74" in text
    for name in ("quality_by_tokens.png", "quality_by_calls.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 500


def test_seeds_are_one_row_with_their_spread(tmp_path):
    names = [f"ours-seed{seed}-4" for seed in (0, 1, 11)]
    text, content = report_of(tmp_path / "out", write_run(tmp_path / "run", dict.fromkeys(names, 4)))
    ours = next(line for line in content["tables"]["table6"] if line["row"] == "ours")["values"]["CLAIR"]["4"]
    means = [100 * stat_of(values_of(name))["mean"] for name in names]
    over_seeds = stat_of(means)
    assert ours == {"mean": pytest.approx(over_seeds["mean"]), "se": pytest.approx(over_seeds["se"]), "n": 3}
    row = next(line for line in text.split("## Seeds")[1].splitlines() if line.startswith("| ours"))
    assert f"{means[0]:.2f}, {means[1]:.2f}, {means[2]:.2f}" in row and f"{over_seeds['se'] * math.sqrt(3):.2f}" in row


def test_differences_are_paired_by_image_and_adjusted_for_their_number(tmp_path):
    run = write_run(tmp_path / "run", {"ours-4": 4, "b-4": 4, "cc-4": 4, "cc-8": 8})
    text, content = report_of(tmp_path / "out", run, reference="b")
    lines = {line["system"]: line for line in content["differences"]}
    assert set(lines) == {"ours", "cc"} and all(line["tokens_per_step"] == 4 for line in lines.values())
    for name, line in lines.items():
        pairs = [100 * (x - y) for x, y in zip(values_of(f"{name}-4"), values_of("b-4"), strict=True)]
        paired, unpaired = stat_of(pairs), stat_of([100 * v for v in values_of(f"{name}-4")])
        assert line["difference"] == pytest.approx(paired["mean"]) and line["n"] == IMAGES
        assert line["se"] == pytest.approx(paired["se"], rel=0.1) and line["se"] < unpaired["se"] / 3
    smaller, larger = sorted(lines.values(), key=lambda line: line["p"])
    assert smaller["p_holm"] == pytest.approx(2 * smaller["p"])
    assert larger["p_holm"] == pytest.approx(max(2 * smaller["p"], larger["p"]))
    assert "Differences from b" in text


def test_a_reference_without_a_speed_is_compared_with_every_speed(tmp_path):
    run = write_run(tmp_path / "run", {"ours-4": 4, "ours-8": 8, "qwen": None})
    _, content = report_of(tmp_path / "out", run, reference="qwen")
    lines = content["differences"]
    assert [(line["system"], line["tokens_per_step"]) for line in lines] == [("ours", 4), ("ours", 8)]
    for line in lines:
        pairs = zip(values_of(f"ours-{line['tokens_per_step']}"), values_of("qwen"), strict=True)
        assert line["difference"] == pytest.approx(stat_of([100 * (x - y) for x, y in pairs])["mean"])


@pytest.mark.parametrize(
    ("other", "systems", "words"),
    [
        ({"judge": {"model": "k"}}, {"b": None}, r"b of .* does not belong in one table with a of .*judge\.model"),
        ({"length": 64}, {"b": None}, "length: 128 in a of .*, 64 now"),
        ({"benchmark": "CapArena", "metrics": {}, "length": 64}, {"a": None}, "length: 128 in a of"),
        ({}, {"a": None}, "both have clair of a: give one of these runs"),
    ],
)
def test_what_was_not_made_alike_is_refused(tmp_path, other, systems, words):
    runs = write_run(tmp_path / "one", {"a": None}), write_run(tmp_path / "two", systems, **other)
    with pytest.raises(UserError, match=words):
        report_of(tmp_path / "out", *runs)


def test_scores_of_another_benchmark_are_in_no_table_of_the_paper(tmp_path):
    runs = write_run(tmp_path / "one", {"ours-4": 4}), write_run(tmp_path / "two", {"ours-4": 4}, benchmark="Scenes")
    text, _ = report_of(tmp_path / "out", *runs)
    mean = f"{100 * stat_of(values_of('ours-4'))['mean']:.2f}"
    rows = [line for line in text.splitlines() if line.startswith("| ours ")]
    other = text.split("## Other benchmarks, without published numbers")[1].split("##")[0]
    assert "CLAIR of Scenes" in other and other.count(mean) == 1
    assert sum(mean in row for row in rows) == 3  # Tables 2 and 6, where `rows` sets it, and the one of scenes
    _, content = report_of(tmp_path / "scenes", runs[1])
    assert all(line["source"] == "published" for lines in content["tables"].values() for line in lines)


def test_the_report_says_on_how_many_images_and_by_whom(tmp_path):
    text, _ = report_of(tmp_path / "out", write_run(tmp_path / "run", {"a": None}))
    assert "- Measured on 40 images of CapMAS, published on 1,000; judge: j." in text
    links = re.findall(r"\]\((.+?)\)", text)
    assert links == ["captions.html"] and (tmp_path / "out" / "captions.html").exists()  # no speed, so nothing to plot
    text, _ = report_of(tmp_path / "speed", write_run(tmp_path / "fast", {"a-4": 4}))
    links = re.findall(r"\]\((.+?)\)", text)
    assert len(links) == 3 and all((tmp_path / "speed" / link).exists() for link in links)


def test_a_number_that_needs_no_judge_counts_once(tmp_path):
    runs = [write_run(tmp_path / name, {"ours-4": 4}, metric="capture") for name in ("one", "two")]
    for run in runs:
        scores = json.loads((run / "scores.json").read_text())
        scores["ours-4"]["counts"] = {}
        (run / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(UserError, match=r"one and .*two both have capture of ours-4: give one of these runs"):
        report_of(tmp_path / "out", *runs, columns={"CAPTURE": "capture"})


def test_mistakes_of_a_report(tmp_path):
    run = write_run(tmp_path / "run", {"a": None})
    with pytest.raises(UserError, match="there is no system 'b'; there are a"):
        report_of(tmp_path / "out", run, reference="b")
    with pytest.raises(UserError, match="none of the statistics quality"):
        report_of(tmp_path / "out", run, columns={"Quality": "quality"})
    (run / "items.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no items.jsonl: run its benchmark with the stage `score` first"):
        report_of(tmp_path / "out", run)


def test_official_numbers_have_no_errors(tmp_path):
    run = write_run(tmp_path / "run", {"a": None, "b": None})
    _, content = report_of(tmp_path / "out", run, official=True)
    assert content["differences"] == []  # which would be of the strict verdicts
    assert content["tables"]["table1"][-1]["values"]["CLAIR"] == {"1": {"mean": 50.0, "se": None, "n": IMAGES}}


def test_a_benchmark_and_its_report_need_no_key_and_no_network(tmp_path, capsys):
    """Two systems judged by the stand-in, then tables and the page."""
    write_capmas(tmp_path / "raw")
    good = captions_file(tmp_path / "good.jsonl")
    good.write_text(good.read_text().replace("A picture, number", "A reference of picture"))
    bad = captions_file(tmp_path / "bad.jsonl")
    settings = [f"captions={{good: {good}, bad: {bad}}}", f"evaluate.data.folder={tmp_path}/raw"]
    main(["conf=eval/capmas,judge/stand_in", *settings, f"evaluate.out={tmp_path}/out"])
    assert "judged by a stand-in that compares words\n" in capsys.readouterr().out
    main(["conf=eval/report", f"evaluate.runs=[{tmp_path}/out]", f"evaluate.out={tmp_path}/report"])
    printed = capsys.readouterr().out
    assert printed == f"{(tmp_path / 'report' / 'report.md').read_text()}\nall files are in {tmp_path}/report\n"
    beside = printed.split("## Beside the scores")[1].split("##")[0].splitlines()
    row = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (beside[4], beside[6])), strict=True))
    assert (row["system"], row["words"], row["claims"]) == ("good", "5.00 ± 0.00", "1.00 ± 0.00")
    good_row = json.loads((tmp_path / "report" / "report.json").read_text())["tables"]["table1"][-2]
    assert good_row["row"] == "good" and good_row["values"]["CLAIR"]["1"]["mean"] == 100.0  # the references' own words
    assert good_row["values"]["CLAIR"]["1"]["n"] == NUM


TRACE = {
    "key": "a",
    "special": {"mask": 0, "eot": 1, "eos": 2},
    "pieces": {"0": "", "1": "", "3": " A", "4": " red", "5": " blue", "6": " ring", "7": " tall"},
    "steps": [
        {"tokens": [3, 7, 6, 0], "rewritten": []},
        {"tokens": [3, 4, 6, 1], "rewritten": [[1, 7, 4]]},
        {"tokens": [3, 5, 6, 1], "rewritten": [[1, 4, 5]]},
    ],
}


def test_marks_say_what_a_sampler_has_rewritten():
    ((start, end, before),) = edit_marks(TRACE, "A blue ring")
    assert ("A blue ring"[start:end], before) == ("blue", "tall → red")
    assert edit_marks(TRACE, "A blue ring.") == []  # a caption that is not the trace's
