"""SIGTERM and Ctrl-C: when a program ends at a signal.

    with Stop() as stop:            the first signal raises `Stopped` where the program is
        stop.held = True            from now on it only sets `stop.asked`
        with stop.at_once(): ...    and in here it raises again

A second signal ends the process at once, wherever it is.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNALLED = 128  # exit code of a program that a signal ended, without the number of the signal


class Stopped(BaseException):
    """A signal ends the program. No `Exception`, so that nothing on the way takes it for an error of its own."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class Stop:
    """Catches signals between `__enter__` and `__exit__`.

    asked: the signal that came, None before; held: whether it waits for `check` instead of raising
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.held = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.catch()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def catch(self) -> None:
        """Take the signals over (again) from whoever handles them now."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In the block a signal raises, also one that has come before: nothing is lost there."""
        held, self.held = self.held, False
        try:
            self.check()
            yield
        finally:
            self.held = held

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.asked:
            raise Stopped(self.asked)

    def _handle(self, number: int, _: object) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = signal.Signals(number)
        if not self.held:
            raise Stopped(self.asked)
