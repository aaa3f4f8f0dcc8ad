"""Stop a program on SIGTERM, Ctrl-C, SIGUSR1 or a stop file.

    with Stop() as stop:            the first signal raises `Stopped` in the main thread
        stop.deferred = True        from now on it only sets `stop.received`
        with stop.at_once(): ...    inside this block it raises again

A second SIGTERM or Ctrl-C ends the process at once. With `Stop(RUN / "STOP")`, creating this file has the effect of
SIGUSR1: a batch job stops all processes on all nodes by it, as signals reach them one by one, and data workers too.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

STOP_FILE_SIGNAL = signal.SIGUSR1
SIGNALS = (signal.SIGTERM, signal.SIGINT, STOP_FILE_SIGNAL)
EXIT_BASE = 128  # the exit code after a signal is 128 + its number
PERIOD = 1.0  # seconds between checks for the stop file


class Stopped(BaseException):
    """Raised on a signal. A BaseException, so that no `except Exception` catches it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class Stop:
    """Catches signals between `__enter__` and `__exit__`.

    received: the signal, None before one arrives; deferred: signals wait for `check` instead of raising
    """

    def __init__(self, file: Path | None = None) -> None:
        self.received: signal.Signals | None = None
        self.deferred = False
        self.file = file
        self._previous_handlers: dict[signal.Signals, Any] = {}  # empty outside of the block

    def __enter__(self) -> Stop:
        self._previous_handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self.catch()
        self._exited = Event()
        if self.file:
            Thread(target=self._watch, args=(self.file, self._exited), name="stop", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._exited.set()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def catch(self) -> None:
        """Install the handlers, again if another library has replaced them."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In this block a signal raises at once, as does one received before: no work is lost by stopping there."""
        deferred, self.deferred = self.deferred, False
        if self._previous_handlers:
            self.catch()  # another library's handler may wait for other processes
        try:
            self.check()
            yield
        finally:
            self.deferred = deferred

    def check(self) -> None:
        """Raise `Stopped` if a signal was received."""
        if self.received:
            raise Stopped(self.received)

    def _watch(self, file: Path, exited: Event) -> None:
        while not self.received and not exited.is_set():
            if file.exists():
                os.kill(os.getpid(), STOP_FILE_SIGNAL)  # the handler runs in the main thread
                return
            exited.wait(PERIOD)

    def _handle(self, number: int, _: object) -> None:
        # Slurm's SIGTERM at the time limit must not interrupt a save.
        if self.received and STOP_FILE_SIGNAL in (self.received, number):
            return
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)
        if not self.deferred:
            raise Stopped(self.received)
