"""A background thread that asks the expert about drafts while further ones are drawn.

    with ExpertThread(expert, journal, bar, patience=3600) as thread:
        for chunk in chunks:
            thread.ask(chunk)
    # every answer is in the journal; with a `deadline`, every answer that came in time

ask -> _collect: expert.revise(unanswered drafts) -> _keep: answers in memory -> _write: journal, synced in groups
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

from src.chat.journal import Answer, Journal
from src.io.progress import Bar
from src.types import DEADLINE, Draft, Expert, FailedRound, Failure

logger = logging.getLogger(__name__)
CANCEL_S = 5.0  # seconds for an expert to react to cancellation
SIGNAL_GRACE_S = 15.0  # seconds for open requests when a signal ends the round
ERROR_GRACE_S = 600.0  # the same when an error ends it
POLL_S = 0.1  # seconds between two checks of how long an expert has been silent
SILENCE = 60.0  # seconds without an answer between two warnings


class SilentExpert(FailedRound):
    """Raised when an expert has not answered for `patience` seconds."""


class ExpertThread:
    """Asks an expert in a background thread; a context manager that exits when every answer is in the journal.

    The expert runs in one event loop for the whole round, so it may keep connections and limits. Raises SilentExpert
    if drafts are unanswered and no answer has come for `patience` seconds.

    deadline: seconds after the last call of `ask` at which asking ends. An expert that `can_finish` completes its
        open requests and returns a DEADLINE failure for all other drafts; any other expert is cancelled at once

    After an error open requests complete too and their answers are kept, within ERROR_GRACE_S; after a signal,
    within SIGNAL_GRACE_S.
    """

    def __init__(
        self, expert: Expert, journal: Journal, bar: Bar, *, patience: float, deadline: float | None = None
    ) -> None:
        self.expert, self.journal, self.bar, self.patience = expert, journal, bar, patience
        self.deadline = math.inf if deadline is None else deadline
        self._last_answer_at = self._last_warning_at = time.monotonic()
        self._finished_asking = False  # the deadline has passed, or an error or a signal ends the round
        self._failed = False  # an error or a signal ends the round
        self._futures: list[Future] = []  # one per call of `ask`
        self._requests: set[str] = set()  # journal ids of all requests so far
        self._unwritten: list[tuple[Draft, Answer]] = []  # answers not yet in the journal
        self._writing: asyncio.Task | None = None
        self._session: AsyncExitStack | None = None  # the expert's connections for the whole round
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="expert", daemon=True)

    def __enter__(self) -> ExpertThread:
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            ends_at = time.monotonic() + self.deadline
            for future in self._futures if error is None else ():
                while not future.done():
                    self._check_silence()
                    if time.monotonic() >= ends_at:
                        self._finish_asking()
                    wait([future], timeout=min(POLL_S, max(0.0, ends_at - time.monotonic()) + 0.01))
                if not (self._finished_asking and future.cancelled()):
                    future.result()
        except BaseException as raised:
            error = type(raised)
            raise
        finally:
            self._end(error)

    def ask(self, drafts: Sequence[Draft]) -> None:
        """Hand over drafts without waiting. Raises any error of earlier ones."""
        for future in self._futures:
            if future.done():
                future.result()
        if all(future.done() for future in self._futures):
            self._last_answer_at = time.monotonic()  # the expert was idle until now
        else:
            self._check_silence()
        self._futures.append(asyncio.run_coroutine_threadsafe(self._collect(drafts), self._loop))

    def _check_silence(self) -> None:
        """Warn about an expert that has not answered for SILENCE seconds. Raises SilentExpert after `patience`."""
        now = time.monotonic()
        silent = now - self._last_answer_at
        if silent > self.patience:
            raise SilentExpert(
                f"expert {self.expert.name} has not answered for {self.patience:.0f} s; its {len(self.journal)} "
                "answers are kept, and the same command continues"
            )
        if min(silent, now - self._last_warning_at) > SILENCE:
            self._last_warning_at = now
            trouble = self.expert.trouble
            logger.warning(
                "expert %s has not answered for %.0f s%s; its %d answers are kept, and stopping loses none of them",
                self.expert.name, silent, trouble and f" ({trouble})", len(self.journal),
            )  # fmt: skip

    def _finish_asking(self) -> None:
        """Send no further requests; an expert that cannot finish is cancelled."""
        if self._finished_asking:
            return
        self._finished_asking = True
        if self.expert.can_finish:
            self._loop.call_soon_threadsafe(self.expert.finish)
            return
        for future in self._futures:
            future.cancel()

    def _end(self, error: type[BaseException] | None) -> None:
        """End the thread. WARN: a thread that the expert blocks is left behind and ends with the process."""
        if error is not None:
            self._failed = True
            self._finish_asking()
            patience_left = self._last_answer_at + self.patience - time.monotonic()
            grace = ERROR_GRACE_S if issubclass(error, Exception) else SIGNAL_GRACE_S
            wait(self._futures, timeout=max(0.0, min(patience_left, grace)))
        try:
            asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result(timeout=CANCEL_S)
        except TimeoutError:
            logger.warning("expert %s blocks its thread, which is left behind", self.expert.name)
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # In the event loop of the thread:

    async def _cancel(self) -> None:
        """Cancel all running tasks but the writing of answers, wait for that, and close the session."""
        tasks = asyncio.all_tasks() - {asyncio.current_task(), self._writing}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._writing is not None:
            await asyncio.gather(self._writing, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        if self._session is not None:
            await self._session.aclose()
        await self._loop.shutdown_default_executor()

    async def _collect(self, drafts: Sequence[Draft]) -> None:
        """Ask about the unanswered ones of a chunk of drafts and keep the answers."""
        unsettled = {}
        for draft in drafts:
            if not self.journal.is_settled(draft) and (request := self.journal.request(draft)) not in self._requests:
                self._requests.add(request)
                unsettled[draft.key] = draft
        self.bar.update(len(drafts) - len(unsettled))
        if not unsettled or self._finished_asking:
            return
        if self._session is None:
            self._session = AsyncExitStack()
            await self._session.enter_async_context(self.expert.session())
        async for key, answer in self.expert.revise(list(unsettled.values())):
            if key not in unsettled:
                raise ValueError(f"expert {self.expert.name} answered {key!r} twice, or was not asked about it")
            draft = unsettled.pop(key)
            if not (self._failed and isinstance(answer, Failure) and answer.reason == DEADLINE):
                self._keep(draft, answer)
        if self._writing is not None:
            await asyncio.shield(self._writing)

    def _keep(self, draft: Draft, answer: Answer) -> None:
        """Queue an answer for the journal, which writes and syncs all queued ones together. Raises an earlier error."""
        self._unwritten.append((draft, answer))
        if self._writing is not None and self._writing.done():
            self._writing = self._writing.result()  # None, or the OSError of a full disk
        if self._writing is None:
            self._writing = self._loop.create_task(self._write())

    async def _write(self) -> None:
        while self._unwritten:
            answers, self._unwritten = self._unwritten, []
            await asyncio.to_thread(self.journal.add_all, answers)
            self._last_answer_at = time.monotonic()
            self.bar.update(len(answers))
