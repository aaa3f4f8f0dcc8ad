"""Exact match of final answers that stand behind `####`, as in GSM8K (arXiv 2110.14168).

ExactMatch().score("7 * 6 = 42\\n#### 42", {"captions": [{"text": "... #### 42.0"}]})   {"exact_match": 1.0, ...}
"""

from __future__ import annotations

import re
from decimal import Decimal

from src.io.errors import UserError
from src.metrics.caption import CaptionMetric
from src.metrics.text import references_of

# a number in groups of three, `1,234` or `1 234`, or one without groups; `$` may stand in front
_NUMBER = r"(-?) *\$? *(-?)(\d{1,3}(?:[, ]\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)"
_ANSWER = re.compile(rf"####[ \t]*{_NUMBER}")


def answer_of(text: str) -> Decimal | None:
    """The number behind the first `####` that a number follows; None where there is none."""
    found = _ANSWER.search(text)
    if found is None:
        return None
    outer, inner, digits = found.groups()
    value = Decimal(re.sub(r"[, ]", "", digits))
    return -value if outer or inner else value


class ExactMatch(CaptionMetric):
    """Per text `exact_match`, 1 where its answer is that of a reference, and `answered`, 1 where it has one.

    Numbers are compared by value: `1,000`, `1 000`, `$1000` and `1000.0` agree. References are the captions of the
    record. Raises UserError for a record without an answer.
    """

    higher_is_better = True
    names = ("exact_match", "answered")

    def score(self, text: str, record: dict) -> dict[str, float]:
        right = {answer_of(reference) for reference in references_of(record)} - {None}
        if not right:
            raise UserError(f"the reference of record {record.get('key', '?')!r} has no answer behind ####")
        given = answer_of(text)
        return {"exact_match": float(given in right), "answered": float(given is not None)}
