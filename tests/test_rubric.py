"""The rubric: questions from graphs, answers of a scripted reader, and precision, recall and F1 by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from src.io.errors import UserError
from src.judges.base import Item
from src.judges.rubric import Rubric
from src.metrics.rubric import Rubric as RubricMetric
from tests.talk import Talk, talk

CAPTION, REFERENCE = "A black dog near a cat.", "A brown dog on the grass. It is wet."
GRAPHS = {
    CAPTION: ["( dog , is , black ) , ( cat , near , dog )"],
    REFERENCE: ["( dog , is , brown ) , ( dog , on , grass )", "( dog , is , wet )"],
}


def item(caption: str | None = CAPTION, row: int = 0) -> Item:
    return Item(key=str(row), row=row, caption=caption, references=(REFERENCE,))


@pytest.fixture
def judge(tmp_path: Path) -> Rubric:
    lines = [json.dumps({"text": text, "graphs": graphs}) for text, graphs in GRAPHS.items()]
    (tmp_path / "graphs.jsonl").write_text("\n".join(lines) + "\n")
    return Rubric(graphs=str(tmp_path / "graphs.jsonl"))


def statements(request) -> dict[str, str]:
    listing = request.user.partition("Statements:\n")[2]
    return dict(re.findall(r"(?m)^(\d+)\. (.*)$", listing))


def score(*talks: Talk, **settings) -> dict[str, float]:
    metric = RubricMetric(num_images=len(talks), **settings)
    for row, done in enumerate(talks):
        assert done.verdict is not None
        metric.update(done.verdict, row)
    return {name: stat["mean"] for name, stat in metric.compute().items()}


def test_every_fact_is_asked_of_the_other_text(judge: Rubric):
    done = talk(judge, item(), ["0. yes\n1. no\n2. no\n3. no\n4. no", "0. Yes.\n1. **no**\n2. no\n3. no"])
    recall, precision = done.requests
    assert list(statements(recall).values()) == [
        "There is: dog", "There is: grass", "dog is brown", "dog is wet", "dog on grass"
    ]  # fmt: skip
    assert list(statements(precision).values()) == ["There is: dog", "There is: cat", "dog is black", "cat near dog"]
    assert CAPTION in recall.user and REFERENCE not in recall.user
    assert REFERENCE in precision.user and "A black dog" not in precision.user
    assert done.verdict is not None
    assert done.verdict["recall: There is: dog"] == 1 and done.verdict["recall: dog is brown"] == 0
    # recall 1/5, precision 1/4: F1 = 2 * .2 * .25 / .45
    expected = {"rubric": 2 / 9, "rubric_worst": 2 / 9, "rubric_recall": 0.2, "rubric_precision": 0.25}
    expected |= {"rubric_recall_object": 0.5, "rubric_recall_attribute": 0.0, "rubric_recall_relation": 0.0}
    assert score(done) == pytest.approx({**expected, "rubric_failed": 0.0})


def test_open_facts_are_asked_again_and_then_fail_alone(judge: Rubric):
    replies = ["0. yes\n1. perhaps\n3. yes", "1. yes\n2. ?\n4. no", None, "0. yes\n1. yes\n2. yes\n3. yes"]
    done = talk(judge, item(), replies)
    assert [list(statements(request)) for request in done.requests] == [
        list("01234"), list("124"), ["2"], list("0123")
    ]  # fmt: skip
    assert done.verdict is not None
    assert done.verdict["recall: dog is brown"] is None
    with pytest.raises(UserError, match=r"11\.1% of the verdicts failed"):
        score(done)
    stats = score(done, max_failed=0.2)
    assert stats["rubric_recall"] == pytest.approx(3 / 4)  # of those with an answer
    assert stats["rubric"] == pytest.approx(2 * 0.75 / 1.75)
    assert stats["rubric_worst"] == pytest.approx(2 * 0.6 / 1.6)  # recall 3/5


def test_missing_and_empty_captions(judge: Rubric):
    missing = talk(judge, item(None), [])
    full = talk(judge, item(), ["0. yes\n1. yes\n2. yes\n3. yes\n4. yes", "0. yes\n1. yes\n2. yes\n3. yes"])
    empty = talk(judge, item(""), ["0. no\n1. no\n2. no\n3. no\n4. no"])
    stats = score(full, empty, missing, max_failed=0.5)
    assert stats["rubric"] == pytest.approx(1 / 2)
    assert stats["rubric_worst"] == pytest.approx(1 / 3)
    assert stats["rubric_failed"] == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="has no graphs of 'Another'"):
        judge.verdict(item("Another")).send(None)
