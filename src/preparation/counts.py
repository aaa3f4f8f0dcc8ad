"""Counts of records and samples by what became of them, and the table of them that `src.prepare` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

Reject = tuple[str, str, str]  # source (`Item.origin`), reason, place


class Skip(Exception):
    """Why a record or sample is left out. reason: as counted in index.json; detail: added to the example."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


class Counts(Counter[str]):
    """Counts by reason.

    examples: the first thing left out for each reason
    source: name of the source that is read now, for the list of what is left out
    rejected: called with everything that is left out
    """

    def __init__(self, rejected: Callable[[Reject], None] | None = None) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}
        self.source = ""
        self._rejected = rejected

    def skip(self, reason: str | Exception, example: str) -> None:
        """Count what is left out; the first example of a reason is kept."""
        place = example + getattr(reason, "detail", "")
        place = place.encode("utf-8", "backslashreplace").decode()  # a file name need not be Unicode
        self[str(reason)] += 1
        self.examples.setdefault(str(reason), place)
        if self._rejected:
            self._rejected((self.source, str(reason), place))

    def report(self) -> dict:
        """Counts and examples as plain data."""
        return {"counts": dict(self), "examples": self.examples}

    def add(self, report: Mapping[str, Mapping]) -> None:
        """Add the `report` of a later part."""
        for reason, number in report["counts"].items():
            self[reason] += number
        for reason, example in report["examples"].items():
            self.examples.setdefault(reason, example)


def table(counts: Mapping[str, Mapping[str, int]], examples: Mapping[str, Mapping[str, str]]) -> str:
    """One line per part and reason; `written` comes first in a part, even if it is 0."""
    rows = []
    for part, numbers in counts.items():
        for reason, number in sorted(numbers.items(), key=lambda row: row[0] != "written"):
            example = examples.get(part, {}).get(reason)
            note = f" (left out), such as {example}" if example else ""
            if number or reason == "written":
                rows.append((part, str(number), reason.replace("_", " ") + note))
    width, digits = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    return "\n".join(f"{part:{width}}  {number:>{digits}}  {words}" for part, number, words in rows)
