"""The judged metrics against the released scorers, whose results on invented replies are in tests/golden/eval.

GOLDEN_EVAL=DIR names another set of the same layout: {clair,coverage,factuality,caparena,uncertainty,text_metrics}.json.
Where a scorer crashes, official mode raises the same error, or has NaN for a ZeroDivisionError.
"""

from __future__ import annotations

import json
import math
import os
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


def check_run(metric: type[JudgedMetric], talks: list[Talk], expect: dict) -> None:
    """The score of a run over all images, its number of requests, and what ended it."""
    status, crashed = expect["status"], [done.error for done in talks if done.error]
    if crashed:  # the scorer meets the images in this order, and stops
        talks = talks[: next(n for n, done in enumerate(talks) if done.error) + 1]
        assert status in ("exit", f"crash:{type(crashed[0]).__name__}")
    else:
        score = official(metric(num_images=len(talks), max_failed=1.0), talks)
        assert status == ("crash:ZeroDivisionError" if math.isnan(score) else "ok")
        if status == "ok":
            assert score == pytest.approx(expect["score"], **EXACT)
            names = [str(name) for name, done in enumerate(talks) if done.verdict["skipped"]]  # type: ignore[index]
            assert len(names) == len(expect["skipped"])
    assert sum(len(done.requests) for done in talks) == expect["calls"]


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
    judge, talks = Clair(mode="official"), []
    for row, name in enumerate(case["rows"]):
        replies = case["replies"].get(name)
        talks.append(talk(judge, item(row, caption=None if replies is None else "a cat"), replies or []))
    for done in talks:
        if done.verdict:  # CLAIR skips both kinds
            done.verdict["skipped"] = max(done.verdict["missing"] or 0, done.verdict["failed"] or 0)
    skipped = [name for name, done in zip(case["rows"], talks, strict=True) if done.verdict and done.verdict["skipped"]]
    assert skipped == case["expect"].get("skipped", skipped)
    check_run(ClairMetric, talks, case["expect"])


@cases("coverage", "parse")
def test_coverage_replies(case):
    assert official_values(case["reply"]) == case["expect"]["values"]


@cases("coverage", "aggregate")
def test_coverage_runs(case):
    judge, talks = Coverage(mode="official"), []
    asked = [image for image in case["images"] if image["answers"] is not None]  # others are not of the benchmark
    for row, image in enumerate(asked):
        key, replies = image["answers"], image.get("replies")
        questions = [f"Question {n}?\nA) one\nB) two" for n in range(len(key))]
        caption = None if replies is None else "a cat"
        talks.append(talk(judge, item(row, caption=caption, questions=questions, answers=key), replies or []))
    check_run(CoverageMetric, talks, case["expect"])
    if "correct" in case["expect"]:
        scored = [done.verdict for done in talks if done.verdict and not done.verdict["skipped"]]
        assert sum(verdict["correct"] for verdict in scored) == case["expect"]["correct"]
        assert sum(verdict["total"] for verdict in scored) == case["expect"]["total"]
        skipped = [i["name"] for i, d in zip(asked, talks, strict=True) if d.verdict and d.verdict["skipped"]]
        assert skipped == case["expect"]["skipped"]


@cases("factuality", "decompose")
def test_factuality_claims(case):
    if "raises" in case["expect"]:
        with pytest.raises(Exception, match="") as error:
            official_claims(case["reply"])
        assert error.typename == case["expect"]["raises"]
    else:
        lines = official_claims(case["reply"])
        assert (lines is None, lines or []) == (case["expect"]["skipped"], case["expect"]["lines"])


@cases("factuality", "verdict")
def test_factuality_verdicts(case):
    if "raises" in case["expect"]:
        with pytest.raises(Exception, match="") as error:
            official_verdicts(case["reply"])
        assert error.typename == case["expect"]["raises"]
    else:
        assert official_verdicts(case["reply"]) == case["expect"]["values"]


@cases("factuality", "aggregate")
def test_factuality_runs(case):
    judge, images = Factuality(mode="official"), case["images"]
    talks = [
        talk(judge, item(row, caption=None if i["replies"] is None else "a cat"), i["replies"] or [])
        for row, i in enumerate(images)
    ]
    check_run(FactualityMetric, talks, case["expect"])
    if "correct" in case["expect"]:
        verdicts = [done.verdict for done in talks if done.verdict]
        assert sum(verdict["true"] for verdict in verdicts) == case["expect"]["correct"]
        assert sum(verdict["total"] for verdict in verdicts) == case["expect"]["total"]
        skipped = [i["name"] for i, d in zip(images, talks, strict=True) if d.verdict and d.verdict["skipped"]]
        assert skipped == case["expect"]["skipped"]


@cases("caparena", "judge")
def test_caparena_judgments(case):
    expect = case["expect"]
    battle = item(rival="a dog runs", baseline=0)
    done = talk(CapArena(mode="official"), battle, case["replies"])
    assert len(done.requests) == expect["calls"]
    assert official_judgment(case["replies"][-1]) == expect["judge"]
    winner = OFFICIAL_WINNERS.get((expect["judge"] or "").removesuffix("."))
    assert done.verdict is not None
    shown = "as_first" if done.requests[0].user.index("a cat") < done.requests[0].user.index("a dog runs") else "as_second"
    own = 1 if shown == "as_first" else 2
    assert done.verdict[shown] == (None if winner is None else 0 if winner == 0 else 1 if winner == own else -1)


def battles_of(case: dict, baselines: list[str]) -> list[dict]:
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
def test_caparena_scores(case):
    baselines = load("caparena")["baselines"]
    battles = battles_of(case, baselines)
    metric = CapArenaScore(num_images=len(battles), max_failed=1.0, baselines=baselines)
    judge = CapArena(mode="official")
    for row, battle in enumerate(battles):
        own = 1 if battle["source1"] == case["test_model"] else 2
        captions = {"rival": battle[f"caption{3 - own}"], "baseline": baselines.index(battle["ref_model"])}
        want = "as_first" if own == 1 else "as_second"
        for key in map(str, range(100)):  # one whose order is that of the battle
            some = Item(
                key=key, row=row, caption=battle[f"caption{own}"], references=("r",), image=Path(__file__), extra=captions
            )
            replies = [f"Reason: a.\nJudgment: {battle['judge']}"] if battle.get("judge") is not None else [""] * 5
            done = talk(judge, some, replies)
            assert done.verdict is not None
            shown = done.requests[0].user
            first, second = (shown.index(f"Caption {n}:") for n in (1, 2))
            if (shown[first:second].strip().endswith(battle[f"caption{own}"].strip())) == (want == "as_first"):
                break
        metric.update(done.verdict, row)
    stats, expect = metric.compute(), case["expect"]
    assert stats["caparena_official"]["mean"] == pytest.approx(expect["score_avg"], **EXACT)
    assert stats["caparena_words"]["mean"] == pytest.approx(expect["length_avg"], **EXACT)
    for number, baseline in enumerate(baselines):
        valid = (metric.column("baseline") == number) & ~metric.outcomes().isnan()
        assert int(valid.sum()) == expect["per_baseline"][baseline]["n_valid"]
        assert stats[f"caparena_{baseline}"]["mean"] == pytest.approx(
            expect["per_baseline"][baseline]["score"], **EXACT
        )


def arena(orders: list[tuple[float | None, float | None]]) -> CapArenaScore:
    """A metric of battles, each with its outcome in both orders, or in one."""
    metric = CapArenaScore(num_images=len(orders))
    for row, (first, second) in enumerate(orders):
        asked = (first is not None) + (second is not None)
        battle = {"missing": 0, "baseline": 0, "as_first": first, "as_second": second, "asked": asked, "words": 1}
        metric.update(battle, row)
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
