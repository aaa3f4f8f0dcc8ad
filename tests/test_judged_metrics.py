"""Metrics that a judge decides: failures, missing captions, duplicates, several ranks."""

from __future__ import annotations

import json
import math

import pytest

from src.io.errors import UserError
from src.metrics.caparena import CapArenaScore
from src.metrics.clair import Clair
from src.metrics.coverage import Coverage
from src.metrics.factuality import Factuality

KINDS = {"clair": Clair, "coverage": Coverage, "factuality": Factuality, "caparena": CapArenaScore}
ZERO = {kind: dict.fromkeys(("missing", *KINDS[kind].columns), 0) for kind in KINDS}


def filled(kind: str, some: list[dict], **settings):
    metric = KINDS[kind](num_images=len(some), max_failed=1.0, **settings)
    for row, verdict in enumerate(some):
        metric.update({**ZERO[kind], **verdict}, row)
    return metric


def means(kind: str, some: list[dict], **settings) -> dict[str, float]:
    return {name: stat["mean"] for name, stat in filled(kind, some, **settings).compute().items()}


def verdicts(kind: str) -> list[dict]:
    """Verdicts on 12 images, with failures of every kind."""
    some = []
    for row in range(12):
        battle = {"baseline": row % 3, "orders": 2, "as_first": row % 3 - 1, "words": row}
        battle |= {"as_second": None if row == 5 else (row + row // 4) % 3 - 1}
        clair = {"score": 0 if row in (3, 7) else row / 11, "failed": int(row in (3, 7))}
        coverage = {"total": 4 + row, "correct": row % 4, "abstained": row % 2, "failed": int(row == 2)}
        claims = {"total": 5 + row, "true": row % 4, "failed": int(row == 2)} if row != 9 else {"skipped": 1}
        some.append({"clair": clair, "coverage": coverage, "factuality": claims, "caparena": battle}[kind])
    return [
        {**ZERO[kind], **verdict, "missing": int(row == 11 and kind == "clair")} for row, verdict in enumerate(some)
    ]


# what failed


def test_failed_scores_are_left_out_or_count_0():
    some = [{"score": 0.8}, {"score": 0.5}, {"failed": 1}, {"missing": 1}]
    stats = filled("clair", some).compute()
    assert stats["clair"] == {"mean": pytest.approx(0.65), "se": pytest.approx(0.15), "n": 2}
    assert stats["clair_worst"]["mean"] == pytest.approx(1.3 / 4) and stats["clair_worst"]["n"] == 4
    assert stats["clair_official"]["mean"] == pytest.approx(0.65)
    assert stats["clair_failed"]["mean"] == 0.5


def test_failed_questions_are_left_out_or_wrong():
    some = [
        {"correct": 3, "total": 4, "abstained": 1},
        {"correct": 1, "total": 10, "failed": 5},
        {"total": 6, "failed": 6, "skipped": 1},
    ]
    stats = means("coverage", some)
    assert stats["coverage"] == pytest.approx(4 / 9) and stats["coverage_worst"] == pytest.approx(4 / 20)
    assert stats["coverage_official"] == pytest.approx(4 / 14)  # the original drops an image without a reply
    assert stats["coverage_macro"] == pytest.approx((3 / 4 + 1 / 5) / 2)
    assert stats["coverage_abstained"] == pytest.approx(1 / 9)
    assert stats["coverage_failed"] == pytest.approx((0 + 0.5 + 1) / 3)


def test_failed_claims_are_left_out_or_false():
    some = [{"true": 2, "total": 4}, {"true": 1, "total": 2, "failed": 1}, {"skipped": 1}, {}]
    stats = means("factuality", some)
    assert stats["factuality"] == pytest.approx(3 / 5)
    assert stats["factuality_worst"] == pytest.approx(3 / (4 + 2 + 2))  # 6 claims of 3 captions that were taken apart
    assert stats["factuality_official"] == pytest.approx(3 / 6)
    assert stats["factuality_macro"] == pytest.approx((1 / 2 + 1) / 2)
    assert stats["factuality_claims"] == pytest.approx(2) and stats["factuality_skipped"] == 0.25
    assert stats["factuality_failed"] == pytest.approx((0 + 0.5 + 1 + 0) / 4)


def test_failed_orders_are_left_out_or_lost():
    won, lost = {"orders": 2, "as_first": 1, "as_second": 1}, {"orders": 2, "as_first": -1, "as_second": -1}
    half = {"orders": 2, "as_first": 1, "as_second": None}
    some = [{**won, "words": 3}, {**won, "words": 5}, lost, half, {"missing": 1, "as_first": None, "as_second": None}]
    stats = means("caparena", some)
    assert stats["caparena"] == pytest.approx(100 / 3)
    assert stats["caparena_worst"] == pytest.approx(100 * (1 + 1 - 1 + 0 - 1) / 5)
    assert stats["caparena_GPT-4o-0806"] == pytest.approx((1 + 1 - 1 + 0.5) / 2)
    assert stats["caparena_official"] == pytest.approx((1 + 1 - 1 + 0.5) / 2 / 3)
    assert stats["caparena_words"] == pytest.approx(2) and stats["caparena_consistency"] == 1
    assert stats["caparena_first_slot"] == pytest.approx(4 / 7) and stats["caparena_failed"] == 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_one_percent_of_failures_is_an_error(kind):
    good = {**verdicts(kind)[0], "failed": 0}
    for bad, refused in ((0, False), (1, False), (2, True)):
        metric = KINDS[kind](num_images=100)
        for row in range(100):
            metric.update({**good, "missing": 1} if row < bad else good, row)
        if refused:
            with pytest.raises(
                UserError, match=r"2\.0% of the verdicts failed, 2 captions of 100 .* evaluate.max_failed=0\.02"
            ):
                metric.compute()
        else:
            assert metric.compute()[f"{kind}_failed"]["mean"] == bad / 100


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_a_verdict_are_an_error(kind):
    metric = KINDS[kind](num_images=3, max_failed=1.0)
    metric.update(verdicts(kind)[0], 1)
    with pytest.raises(UserError, match=f"{kind}: 2 of 3 images are not judged yet"):
        metric.compute()


def test_nothing_scored_is_no_number():
    stats = means("clair", [{"failed": 1}])
    assert math.isnan(stats["clair"]) and math.isnan(stats["clair_official"]) and stats["clair_worst"] == 0
    stats = means("factuality", [{"skipped": 1}])
    assert math.isnan(stats["factuality"]) and math.isnan(stats["factuality_worst"])
    assert math.isnan(means("caparena", [{"orders": 1, "as_first": None, "as_second": None}])["caparena"])


# the same images more than once, and several ranks


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_counts_once(kind):
    some = verdicts(kind)
    expected = filled(kind, some).compute()
    one, other = (KINDS[kind](num_images=12, max_failed=1.0) for _ in range(2))
    for row in (0, 1, 2, 3, 4, 5, 11, 0):
        one.update(some[row], row)
    for row in (5, 6, 7, 8, 9, 10, 11):
        other.update(some[row], row)
    one.merge_state(other)
    assert json.dumps(one.compute()) == json.dumps(expected)
