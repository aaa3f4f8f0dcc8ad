"""Asking an expert in a thread of its own, while drafts are drawn.

with ExpertThread(expert, journal, bar, patience=3600) as thread:
    for chunk in drawn:
        thread.ask(chunk)
# every answer is in the journal; with a `deadline`, those that came by then
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import AsyncExitStack
from threading import Thread

from tqdm import tqdm

from src.chat.journal import Answer, Journal
from src.types import DEADLINE, Draft, Expert, FailedRound, Failure

logger = logging.getLogger(__name__)
LEAVE = 5.0  # seconds for an expert to let go of what it waits for
LAST = 15.0  # seconds for replies that are under way when a signal ends the round
LONGEST = 600.0  # the same for an error
LOOK = 0.25  # seconds between two looks at how long an expert has been silent
WAITING = 64  # answers that may wait for the journal
SILENCE = 60.0  # seconds without an answer after which it is told that there is none


class SilentExpert(FailedRound):
    """An expert that does not answer any more."""


class ExpertThread:
    """Asks an expert in a thread of its own; a context manager that ends when every answer is in the journal.

    The expert lives in one event loop for the whole round, so it may keep connections and limits of its own. Raises
    SilentExpert where it has been asked, and `patience` seconds have gone by without an answer.

    deadline: seconds from the last question, after which no more is asked. An expert that has a method `finish` then
        ends with the requests that are under way, and fails with DEADLINE for all other drafts; others are left at once

    After an error, too, what is under way comes to its end and is kept; after a signal, what takes less than LAST.
    """

    def __init__(
        self, expert: Expert, journal: Journal, bar: tqdm, *, patience: float, deadline: float | None = None
    ) -> None:
        self.expert, self.journal, self.bar, self.patience = expert, journal, bar, patience
        self.deadline = math.inf if deadline is None else deadline
        self._last_answer_at = self._last_warning_at = time.monotonic()
        self._over = False  # no more is asked: the deadline has passed, or
        self._broken = False  # something went wrong
        self._wrong: OSError | None = None  # the journal cannot be written
        self._asked: list[Future] = []
        self._open: set[str] = set()  # questions that are under way
        self._fresh: list[tuple[Draft, Answer]] = []  # answers on their way to the journal
        self._writing: asyncio.Task | None = None
        self._session: AsyncExitStack | None = None  # of an expert that has one: connections for the whole round
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="expert", daemon=True)

    def __enter__(self) -> ExpertThread:
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                ends = time.monotonic() + self.deadline
                for future in self._asked:
                    self._wait(future, ends)
        except BaseException as wrong:
            error = type(wrong)
            raise
        finally:
            self._end(error)
        if self._wrong:
            raise self._wrong

    def ask(self, drafts: Sequence[Draft]) -> None:
        """Hand over drafts without waiting. Raises what the expert raised about earlier ones."""
        if self._wrong:
            raise self._wrong
        for future in self._asked:
            if future.done():
                future.result()
        if all(future.done() for future in self._asked):
            self._last_answer_at = time.monotonic()  # nothing was asked of it until now
        else:
            self._check_silence()
        self._asked.append(asyncio.run_coroutine_threadsafe(self._collect(drafts), self._loop))

    def _wait(self, future: Future, ends: float) -> None:
        while not future.done():
            self._check_silence()
            if not self._over and time.monotonic() >= ends:
                self._finish()
            left = min(self._last_answer_at + self.patience, math.inf if self._over else ends) - time.monotonic()
            wait([future], timeout=max(0.0, min(left, LOOK)) + 0.01)
        if not (self._over and future.cancelled()):
            future.result()

    def _finish(self) -> None:
        """Ask no more."""
        if self._over:
            return
        self._over = True
        finish = getattr(self.expert, "finish", None)
        if finish is not None:
            self._loop.call_soon_threadsafe(finish)
            return
        for future in self._asked:
            future.cancel()

    def _check_silence(self) -> None:
        """Tell of an expert that has not answered for a while. Raises SilentExpert after `patience`."""
        now = time.monotonic()
        silent = now - self._last_answer_at
        if silent > self.patience:
            raise SilentExpert(
                f"expert {self.expert.name} has not answered for {self.patience:.0f} s; its {len(self.journal)} "
                "answers are kept, and the same command continues"
            )
        if min(silent, now - self._last_warning_at) > SILENCE:
            self._last_warning_at = now
            trouble = getattr(self.expert, "trouble", "")
            logger.warning(
                "expert %s has not answered for %.0f s%s; its %d answers are kept, and a stop loses none of them",
                self.expert.name, silent, trouble and f" ({trouble})", len(self.journal),
            )  # fmt: skip

    def _end(self, error: type[BaseException] | None) -> None:
        """End the thread. One that its expert blocks is left behind, and ends with the process."""
        if error is not None:
            self._broken = True
            self._finish()
            left = self._last_answer_at + self.patience - time.monotonic()
            wait(self._asked, timeout=max(0.0, min(left, LONGEST if issubclass(error, Exception) else LAST)))
        try:
            asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result(timeout=LEAVE)
        except TimeoutError:
            logger.warning("expert %s does not let go of its thread", self.expert.name)
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel(self) -> None:
        """End what still runs; after an error, that is all chunks without answers. What came is kept."""
        rest = asyncio.all_tasks() - {asyncio.current_task(), self._writing}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        if self._writing is not None:
            await asyncio.gather(self._writing, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        if self._session is not None:
            await self._session.aclose()
        await self._loop.shutdown_default_executor()

    async def _collect(self, drafts: Sequence[Draft]) -> None:
        unsettled = {draft.key: draft for draft in drafts if self._is_new(draft)}
        self._open.update(map(self.journal.request, unsettled.values()))
        self.bar.update(len(drafts) - len(unsettled))
        if not unsettled or self._over:
            return
        if self._session is None and (session := getattr(self.expert, "session", None)):
            self._session = AsyncExitStack()
            await self._session.enter_async_context(session())
        async for key, answer in self.expert.revise(list(unsettled.values())):
            if key not in unsettled:
                raise ValueError(f"expert {self.expert.name} answered {key!r} twice, or without being asked")
            draft = unsettled.pop(key)
            if not (self._broken and isinstance(answer, Failure) and answer.reason == DEADLINE):
                self._keep(draft, answer)
            if self._writing is not None and len(self._fresh) >= WAITING:
                await asyncio.shield(self._writing)
        if self._writing is not None:
            await asyncio.shield(self._writing)

    def _is_new(self, draft: Draft) -> bool:
        return not self.journal.is_settled(draft) and self.journal.request(draft) not in self._open

    def _keep(self, draft: Draft, answer: Answer) -> None:
        """Hand an answer to the journal, which syncs all that have come while it was busy at once."""
        self._fresh.append((draft, answer))
        if self._writing is None or self._writing.done():
            self._writing = self._loop.create_task(self._write())

    async def _write(self) -> None:
        while self._fresh:
            some, self._fresh = self._fresh, []
            try:
                await asyncio.to_thread(self.journal.add_all, some)
            except OSError as error:  # the disk is full, perhaps: nothing more is asked, but what comes is tried
                self._wrong, self._broken = self._wrong or error, True
                self._finish()
                continue
            self._last_answer_at = time.monotonic()
            self.bar.update(len(some))
