"""The judged metrics against the released scorers, whose results on invented replies are in tests/golden/eval.

GOLDEN_EVAL=DIR names another set of the same layout.
Where a scorer crashes, official mode raises the same error, or has NaN for a ZeroDivisionError.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from src.judges.base import Item
from src.judges.caparena import OFFICIAL_WINNERS, CapArena, official_judgment
from src.judges.clair import Clair
from src.judges.coverage import Coverage, official_values
from src.judges.factuality import Factuality, official_claims, official_verdicts
from src.metrics.caparena import CapArenaScore
from src.metrics.caption import summarise
from src.metrics.clair import Clair as ClairMetric
from src.metrics.coverage import Coverage as CoverageMetric
from src.metrics.factuality import Factuality as FactualityMetric
from src.metrics.judged import JudgedMetric
from src.metrics.overlap import Bleu, Cider, RougeL, tokens_of
from tests.talk import Talk, talk

FOLDER = Path(os.environ.get("GOLDEN_EVAL") or Path(__file__).parent / "golden" / "eval")
EXACT = {"abs": 1e-9, "rel": 0}


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def cases(name: str, kind: str):
    some = load(name)[f"{kind}_cases"]
    return pytest.mark.parametrize("case", some, ids=[case.get("id", str(n)) for n, case in enumerate(some)])


def item(row: int = 0, caption: str | None = "a cat", **extra) -> Item:
    return Item(key=str(row), row=row, caption=caption, references=("a dog",), image=Path(__file__), extra=extra)


def official(metric: JudgedMetric, talks: list[Talk]) -> float:
    for row, done in enumerate(talks):
        assert done.verdict is not None
        metric.update(done.verdict, row)
    return metric.compute()[f"{metric.name}_official"]["mean"]


def check_run(metric: type[JudgedMetric], talks: dict[str, Talk], expect: dict, *, skips: Callable) -> None:
    """The score of a run over all images, by name, its number of requests, what it skips, and what ended it.

    skips: whether the scorer lists an image with a verdict as skipped
    """
    status, dones = expect["status"], list(talks.values())
    if crashed := [number for number, done in enumerate(dones) if done.error]:
        dones = dones[: crashed[0] + 1]  # the scorer meets the images in this order, and stops
        assert status in ("exit", f"crash:{type(dones[-1].error).__name__}")
    else:
        score = official(metric(num_images=len(dones), max_failed=1.0), dones)
        assert status == ("crash:ZeroDivisionError" if math.isnan(score) else "ok")
        if status == "ok":
            assert score == pytest.approx(expect["score"], **EXACT)
            verdicts = {name: done.verdict for name, done in talks.items() if done.verdict}
            assert [name for name, verdict in verdicts.items() if skips(verdict)] == expect["skipped"]
            for name, column in (("correct", metric.columns[0]), ("total", "total")):
                if name in expect:
                    assert sum(v[column] or 0 for v in verdicts.values() if not skips(v)) == expect[name]
    assert sum(len(done.requests) for done in dones) == expect["calls"]


def outcome(function, text: str):
    """What it returns, or the name of the error that it raises."""
    try:
        return function(text)
    except (IndexError, ValueError) as error:
        return type(error).__name__


@cases("clair", "parse")
def test_clair_replies(case):
    done, expect = talk(Clair(mode="official"), item(), case["replies"]), case["expect"]
    assert len(done.requests) == expect["calls"]
    if "raises" in expect:
        assert type(done.error).__name__ == expect["raises"]
    else:
        assert done.verdict is not None
        assert done.verdict["score"] == pytest.approx(expect["score"], **EXACT)
        assert bool(done.verdict["failed"]) == expect["failed"]


@cases("clair", "aggregate")
def test_clair_runs(case):
    talks = {}
    for row, name in enumerate(case["rows"]):
        replies = case["replies"].get(name)
        caption = None if replies is None else "a cat"
        talks[name] = talk(Clair(mode="official"), item(row, caption=caption), replies or [])
    check_run(ClairMetric, talks, case["expect"], skips=lambda v: v["missing"] or v["failed"])


@cases("coverage", "parse")
def test_coverage_replies(case):
    assert outcome(official_values, case["reply"]) == case["expect"].get("raises", case["expect"].get("values"))


@cases("coverage", "aggregate")
def test_coverage_runs(case):
    talks = {}
    images = [image for image in case["images"] if image["answers"] is not None]  # others are not of the benchmark
    for row, image in enumerate(images):
        key, replies = image["answers"], image.get("replies")
        questions = [f"Question {n}?\nA) one\nB) two" for n in range(len(key))]
        caption = None if replies is None else "a cat"
        asked = item(row, caption=caption, questions=questions, answers=key)
        talks[image["name"]] = talk(Coverage(mode="official"), asked, replies or [])
    check_run(CoverageMetric, talks, case["expect"], skips=lambda v: v["skipped"] and not v["missing"])


@cases("factuality", "decompose")
def test_factuality_claims(case):
    expect = case["expect"]
    lines = outcome(official_claims, case["reply"])
    assert lines == expect.get("raises", None if expect.get("skipped") else expect.get("lines"))


@cases("factuality", "verdict")
def test_factuality_verdicts(case):
    assert outcome(official_verdicts, case["reply"]) == case["expect"].get("raises", case["expect"].get("values"))


@cases("factuality", "aggregate")
def test_factuality_runs(case):
    talks = {}
    for row, image in enumerate(case["images"]):
        caption = None if image["replies"] is None else "a cat"
        talks[image["name"]] = talk(Factuality(mode="official"), item(row, caption=caption), image["replies"] or [])
    check_run(FactualityMetric, talks, case["expect"], skips=lambda v: v["skipped"])


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    """Keys of two images whose battles show the caption under test first, and second."""
    orders = {}
    for key in map(str, range(100)):
        done = talk(CapArena(mode="official"), battle(key, "one", "two"), ["Reason: a.\nJudgment: Tie"])
        shown = done.requests[0].user
        orders["as_first" if shown.index("one") < shown.index("two") else "as_second"] = key
    return orders


def battle(key: str, caption: str, rival: str, baseline: int = 0) -> Item:
    extra = {"rival": rival, "baseline": baseline}
    return Item(key=key, row=0, caption=caption, references=("r",), image=Path(__file__), extra=extra)


@cases("caparena", "judge")
def test_caparena_judgments(case, keys):
    expect = case["expect"]
    assert official_judgment(case["replies"][-1]) == expect["judge"]
    winner = OFFICIAL_WINNERS.get((expect["judge"] or "").removesuffix("."))
    for own, order in enumerate(("as_first", "as_second"), 1):
        done = talk(CapArena(mode="official"), battle(keys[order], "one", "two"), case["replies"])
        assert len(done.requests) == expect["calls"]
        assert done.verdict is not None
        assert done.verdict[order] == (None if winner is None else 0 if winner == 0 else 1 if winner == own else -1)


def battles_of(case: dict) -> list[dict]:
    """The battles of a case; of counts, with the model under test in alternating places."""
    if "battles" in case:
        return case["battles"]
    battles, kinds = [], {"tie": "Tie", "missing": None, "invalid": "neither"}
    for baseline, counts in case["counts"].items():
        for kind, count in counts.items():
            for n in range(count):
                sources = [case["test_model"], baseline][:: 1 if n % 2 == 0 else -1]
                winner = case["test_model"] if kind == "win" else baseline
                judge = kinds[kind] if kind in kinds else f"Caption {sources.index(winner) + 1} is better"
                captions = ["one two three" if source == case["test_model"] else "x y" for source in sources]
                battles.append(
                    {"ref_model": baseline, "judge": judge}
                    | {f"source{i + 1}": source for i, source in enumerate(sources)}
                    | {f"caption{i + 1}": caption for i, caption in enumerate(captions)}
                )
    return battles


@cases("caparena", "score")
def test_caparena_scores(case, keys):
    baselines, judge = load("caparena")["baselines"], CapArena(mode="official")
    battles = battles_of(case)
    metric = CapArenaScore(num_images=len(battles), max_failed=1.0, baselines=baselines)
    for row, fought in enumerate(battles):
        own = 1 if fought["source1"] == case["test_model"] else 2
        captions = [fought[f"caption{own}"], fought[f"caption{3 - own}"], baselines.index(fought["ref_model"])]
        judgment = fought.get("judge")
        replies = [""] * 5 if judgment is None else [f"Reason: a.\nJudgment: {judgment}"]
        done = talk(judge, battle(keys["as_first" if own == 1 else "as_second"], *captions), replies)
        assert done.verdict is not None
        metric.update(done.verdict, row)
    stats, expect = metric.compute(), case["expect"]
    assert stats["caparena_official"]["mean"] == pytest.approx(expect["score_avg"], **EXACT)
    assert stats["caparena_words"]["mean"] == pytest.approx(expect["length_avg"], **EXACT)
    for number, baseline in enumerate(baselines):
        valid = (metric.column("baseline") == number) & ~metric.outcomes().isnan()
        score = stats[f"caparena_{baseline}"]["mean"]
        assert int(valid.sum()) == expect["per_baseline"][baseline]["n_valid"]
        assert score == pytest.approx(expect["per_baseline"][baseline]["score"], **EXACT)


def arena(orders: list[tuple[float | None, float | None]]) -> CapArenaScore:
    """A metric of battles, each with its outcome in both orders, or in one."""
    metric = CapArenaScore(num_images=len(orders))
    for row, (first, second) in enumerate(orders):
        asked = (first is not None) + (second is not None)
        verdict = {"missing": 0, "baseline": 0, "as_first": first, "as_second": second, "orders": asked, "words": 1}
        metric.update(verdict, row)
    return metric


@cases("uncertainty", "arena")
def test_errors_of_battles(case):
    metric = arena([(1, None)] * case["win"] + [(None, -1)] * case["loss"] + [(0, None)] * case["tie"])
    stat = metric.compute()["caparena"]
    assert stat["mean"] == pytest.approx(case["expect"]["score"], **EXACT)
    assert stat["se"] == pytest.approx(case["expect"]["se"], **EXACT)


@cases("uncertainty", "mean")
def test_errors_of_means(case):
    metric = ClairMetric(num_images=len(case["values"]))
    for row, value in enumerate(case["values"]):
        metric.update({"missing": 0, "score": value, "failed": 0}, row)
    for stat in (metric.compute()["clair"], summarise(case["values"])):
        assert stat["mean"] == pytest.approx(case["expect"]["mean"], **EXACT)
        assert stat["se"] == pytest.approx(case["expect"]["se"], **EXACT)


@cases("uncertainty", "ratio")
def test_errors_of_ratios(case):
    metric, expect = CoverageMetric(num_images=len(case["pairs"])), case["expect"]
    for row, (correct, total) in enumerate(case["pairs"]):
        counts = {"missing": 0, "abstained": 0, "failed": 0, "skipped": 0}
        metric.update({**counts, "correct": correct, "total": total}, row)
    stat = metric.compute()["coverage"]
    assert stat["mean"] == pytest.approx(expect["ratio"], **EXACT)
    assert stat["se"] == pytest.approx(expect["se_cluster"], **EXACT)


@cases("uncertainty", "swap")
def test_battles_in_both_orders(case):
    sign = {"first": 1, "second": -1, "tie": 0}
    metric = arena([(sign[first], -sign[second]) for first, second in case["verdicts"]])
    stats, expect = metric.compute(), case["expect"]
    assert metric.outcomes().tolist() == pytest.approx(expect["outcomes"], **EXACT)
    assert stats["caparena"]["mean"] == pytest.approx(100 * expect["mean_outcome"], **EXACT)
    assert stats["caparena_consistency"]["mean"] == pytest.approx(expect["consistency"], **EXACT)
    assert stats["caparena_first_slot"]["mean"] == pytest.approx(expect["first_position_rate"], **EXACT)


@pytest.mark.parametrize("case", load("text_metrics")["tokenizer_cases"], ids=lambda case: case["text"])
def test_tokens(case):
    assert " ".join(tokens_of(case["text"])) == case["tokens"]


@cases("text_metrics", "metric")
def test_bleu_rouge_cider(case):
    texts, expect, near = list(case["candidates"].values()), case["expect"], {"abs": 1e-6, "rel": 0}
    records = [
        {"key": key, "captions": [{"text": text} for text in case["references"][key]]} for key in case["candidates"]
    ]
    stats = {}
    for metric in (Bleu(), RougeL(), cider := Cider()):
        metric.update(texts, records)
        stats |= metric.compute()
    bleu = [stats[name]["mean"] for name in ("bleu_1", "bleu_2", "bleu_3", "bleu")]
    assert bleu == pytest.approx(expect["bleu"], **near)
    assert stats["rouge_l"]["mean"] == pytest.approx(expect["rouge_l"], **near)
    assert stats["cider"]["mean"] == pytest.approx(expect["cider"], **near)
    assert cider.per_image() == pytest.approx(expect["cider_per_image"], **near)


@pytest.mark.slow
def test_another_set_of_cases_is_used_and_one_wrong_value_is_noticed(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "set")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "clair or errors_of_means"]

    def codes() -> int:
        environment = {**os.environ, "GOLDEN_EVAL": str(tmp_path / "set")}
        return subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True).returncode

    assert codes() == 0
    content = load("uncertainty")
    content["mean_cases"][0]["expect"]["se"] += 1e-6
    (tmp_path / "set" / "uncertainty.json").write_text(json.dumps(content))
    assert codes() == 1
