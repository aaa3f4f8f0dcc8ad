"""Progress bars: tqdm on a terminal; in a file or a pipe a plain line now and then, and one at the end.

    with Bar(total=384, unit="caption", desc="evaluate") as bar:
        bar.update(len(batch))
    for record in Bar(records, unit="record", desc="read"): ...

    evaluate:  25%|###         | 96/384 [00:08<00:24, 12.00 caption/s]        a terminal: one line, drawn over and over
    evaluate: 96/384 caption [00:30<01:30, 3.20 caption/s]                    else: a line every EVERY_S seconds

A bar inside another one vanishes when it is finished. Log messages appear above the bars (`LogHandler`).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

EVERY_S = 30.0  # seconds between two lines where the output is no terminal
WORTH_A_LINE_S = 5.0  # what takes less, inside another bar, leaves no line there
LINE = "{desc}: {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
WITHOUT_TOTAL = "{desc}: {n_fmt}{unit} [{elapsed}, {rate_fmt}{postfix}]"


class Bar(tqdm):
    """A tqdm bar on standard error.

    unit: in the singular; status: called for every drawing, its text stands at the end
    disable: for ranks other than 0; smoothing: 0 averages the rate over all the time
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        *,
        desc: str,
        unit: str,
        total: int | None = None,
        initial: int = 0,
        status: Callable[[], str] | None = None,
        disable: bool = False,
        smoothing: float = 0.3,
    ) -> None:
        # a terminal that does not say its size, as under `script`, would show nothing
        self.is_plain = not (sys.stderr.isatty() and all(os.get_terminal_size(sys.stderr.fileno())))
        self.status = status
        self.written_at, self.written_n = time.monotonic(), -1
        lines = {"bar_format": LINE, "mininterval": EVERY_S, "miniters": 1, "nrows": 24}
        options: dict[str, Any] = lines if self.is_plain else {"dynamic_ncols": True}
        options |= {"total": total, "initial": initial, "disable": disable, "smoothing": smoothing}
        super().__init__(iterable, desc=desc, unit=f" {unit}", leave=None, **options)
        if self.is_plain and self.total is None:
            self.bar_format = WITHOUT_TOTAL

    @property
    def format_dict(self) -> dict[str, Any]:
        return dict(super().format_dict) | ({"postfix": self.status()} if self.status else {})

    def __str__(self) -> str:
        return self._text()

    # tqdm draws through the following three; on a terminal as it sees fit, elsewhere not at all.

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if not self.is_plain:
            return super().display(msg, pos)
        if msg is None and time.monotonic() - self.written_at >= EVERY_S:
            self._write_line()
        return False

    def clear(self, nolock: bool = False) -> None:
        if not self.is_plain:
            super().clear(nolock)

    def close(self) -> None:
        if self.is_plain and not self.disable:
            if self.n != self.written_n and (not self.pos or self.format_dict["elapsed"] >= WORTH_A_LINE_S):
                self._write_line(rate=None)  # that of all the time
            self.leave = False
        super().close()

    def _write_line(self, **values: Any) -> None:
        self.written_at, self.written_n = time.monotonic(), self.n
        self.fp.write(self._text(ncols=None, **values) + "\n")
        self.fp.flush()

    def _text(self, **values: Any) -> str:
        return self.format_meter(**(self.format_dict | values)).replace("s/ ", "s/")  # `1.12s/draft`, `0.89 draft/s`


class LogHandler(logging.StreamHandler):
    """Writes messages to standard error, above open bars."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def close_bars() -> None:
    """Close every open bar, inner ones first, so that what is printed next has a line of its own."""
    bars = tqdm._instances  # type: ignore[attr-defined]
    for bar in sorted(bars, key=lambda bar: -bar.pos):
        bar.close()


@contextmanager
def closing_bars() -> Iterator[None]:
    """Context at whose end no bar is open, also after an error."""
    try:
        yield
    finally:
        close_bars()
