"""SIGTERM, Ctrl-C and a file: when a program ends because somebody else wants it to.

    with Stop() as stop:            the first signal raises `Stopped` where the program is
        stop.held = True            from now on it only sets `stop.asked`
        with stop.at_once(): ...    and in here it raises again

A second SIGTERM or Ctrl-C ends the process at once; within seconds where it waits for other processes, as Python
answers no signal until that is over.

    with Stop(RUN / "STOP"): ...    a file of that name asks as well, as if SIGUSR1 had come

The file is how a batch job tells all processes of all its nodes: signals reach them one by one, and reach workers too.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

BY_FILE = signal.SIGUSR1
SIGNALS = (signal.SIGTERM, signal.SIGINT, BY_FILE)
SIGNALLED = 128  # exit code of a program that a signal ended, without the number of the signal
PERIOD = 1.0  # seconds between two looks for the file
PATIENCE = 3.0  # seconds for Python to answer a second signal


class Stopped(BaseException):
    """A signal ends the program. No `Exception`, so that nothing on the way takes it for an error of its own."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class Stop:
    """Catches signals between `__enter__` and `__exit__`.

    asked: the signal that came, None before; held: whether it waits for `check` instead of raising
    """

    def __init__(self, file: Path | None = None) -> None:
        self.asked: signal.Signals | None = None
        self.held = False
        self.file = file
        self._left = Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self._left.clear()
        self.catch()
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        Thread(target=_end_at_second, args=(reader,), name="second signal", daemon=True).start()
        if self.file:
            Thread(target=self._watch, args=(self.file,), name="stop", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
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
        if self._before and not self._left.is_set():
            self.catch()  # others may have put handlers in front, which wait for other processes
        try:
            self.check()
            yield
        finally:
            self.held = held

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.asked:
            raise Stopped(self.asked)

    def _watch(self, file: Path) -> None:
        while not self.asked and not self._left.is_set():
            if file.exists():
                os.kill(os.getpid(), BY_FILE)  # the handler runs in the main thread, wherever that is
                return
            self._left.wait(PERIOD)

    def _handle(self, number: int, _: object) -> None:
        if self.asked and BY_FILE in (self.asked, number):  # Slurm's SIGTERM at the limit must not cut a save short
            return
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = signal.Signals(number)
        if not self.held:
            raise Stopped(self.asked)


def _end_at_second(reader: int) -> None:
    """End the process at the second signal that ends it. reader: of a pipe that gets a byte for each signal."""
    seen = 0
    with os.fdopen(reader, "rb", buffering=0) as stream:
        while byte := stream.read(1):
            seen += byte[0] in (signal.SIGTERM, signal.SIGINT)
            if seen > 1:
                time.sleep(PATIENCE)
                os._exit(SIGNALLED + byte[0])
