"""Exact match of final answers, given after `####` as in GSM8K (arXiv 2110.14168).

ExactMatch().score("7 * 6 = 42\n#### 42", {"captions": [{"text": "... #### 42.0"}]})   {"exact_match": 1.0, ...}
"""

from __future__ import annotations

import re
from decimal import Decimal

from src.io.errors import UserError
from src.metrics.caption import CaptionMetric
from src.metrics.text import references_of

# digits in groups of three, `1,234` or `1 234`, or ungrouped; may follow `$`
_NUMBER = r"(-?) *\$? *(-?)(\d{1,3}(?:[, ]\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)"
_ANSWER = re.compile(rf"####[ \t]*{_NUMBER}")


def answer_of(text: str) -> Decimal | None:
    """The number after the first `####` that is followed by a number; None if there is none."""
    if (match := _ANSWER.search(text)) is None:
        return None
    minus_before_dollar, minus_after_dollar, digits = match.groups()
    value = Decimal(re.sub(r"[, ]", "", digits))
    return -value if minus_before_dollar or minus_after_dollar else value


class ExactMatch(CaptionMetric):
    """Per text: `exact_match`, 1 if its answer equals, by value, that of a caption of the record, and `answered`, 1 if
    it has an answer. Raises UserError for a record without an answer.
    """

    higher_is_better = True
    names = ("exact_match", "answered")

    def score(self, text: str, record: dict) -> dict[str, float]:
        correct = {answer_of(reference) for reference in references_of(record)} - {None}
        if not correct:
            raise UserError(f"the reference of record {record.get('key', '?')!r} has no answer after ####")
        answer = answer_of(text)
        return {"exact_match": float(answer in correct), "answered": float(answer is not None)}
