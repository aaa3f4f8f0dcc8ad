"""POPE: yes-or-no questions about objects (arXiv 2305.10355).

    Pope(questions="coco_pope_random.json")      JSON lines {"question_id": 1, "label": "yes", ...}

A text answers the question whose `question_id` is the key of its record.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from src.io.errors import UserError
from src.metrics.caption import CaptionMetric, Stat, divide, plain

_ANSWER = re.compile(r"\b(yes|no|not)\b", re.IGNORECASE)


class Pope(CaptionMetric):
    """`pope_accuracy`, precision, recall and F1 of "yes" (`pope_f1`, ...), and `pope_yes`, the share of such answers.

    An answer is the first `yes`, `no` or `not` of a text. A text without one is wrong, and counts in
    `pope_unreadable`; the released scorer takes it for a yes.
    """

    higher_is_better = True
    names = ("pope_accuracy", "pope_yes", "pope_unreadable", "pope_hits", "pope_positives")

    def __init__(self, *, questions: str) -> None:
        super().__init__()
        rows = [json.loads(line) for line in Path(questions).read_text("utf-8").strip().split("\n")]
        self.labels = {str(row["question_id"]): row["label"].lower() for row in rows}

    def score(self, text: str, record: dict) -> dict[str, float]:
        if (label := self.labels.get(str(record["key"]))) is None:
            raise UserError(f"POPE's file has no question {record['key']!r}; keys must be its question_id")
        match = _ANSWER.search(text)
        answer = None if match is None else "yes" if match[1].lower() == "yes" else "no"
        return {
            "pope_accuracy": float(answer == label),
            "pope_yes": float(answer == "yes"),
            "pope_unreadable": float(answer is None),
            "pope_hits": float(answer == label == "yes"),
            "pope_positives": float(label == "yes"),
        }

    def compute(self) -> dict[str, Stat]:
        stats, values = super().compute(), self.columns()
        yes, hits, positives = (sum(values[f"pope_{name}"]) for name in ("yes", "hits", "positives"))
        shares = {"precision": (hits, yes), "recall": (hits, positives), "f1": (2 * hits, yes + positives)}
        n = stats["pope_yes"]["n"]
        return {**stats, **{f"pope_{name}": plain(divide(*share), n) for name, share in shares.items()}}
