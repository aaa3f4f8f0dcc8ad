"""Counts of records and samples by what became of them, and the table of them that `src.prepare` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

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
                rows.append((part, number, reason.replace("_", " ") + note))
    return grid(rows)


def grid(rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned columns; to the right where the last row has a number."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numbers = [isinstance(cell, int | float) for cell in rows[-1]] if rows else []
    lines = (
        [
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(row, widths, numbers, strict=True)
        ]
        for row in cells
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
