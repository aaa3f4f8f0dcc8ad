"""Asking an expert in a thread of its own, while drafts are drawn.

with ExpertThread(expert, journal, bar, patience=3600) as thread:
    for chunk in drawn:
        thread.ask(chunk)
# every answer is in the journal
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from threading import Thread

from tqdm import tqdm

from src.batch import Draft, Expert
from src.journal import Journal

logger = logging.getLogger(__name__)
LEAVE = 5.0  # seconds for an expert to let go of what it waits for


class FailedRound(ValueError):
    """A round that cannot be made, or is of no use, for a reason that the user can mend."""


class SilentExpert(FailedRound):
    """An expert that does not answer any more."""


class ExpertThread:
    """Asks an expert in a thread of its own; a context manager that ends when every answer is in the journal.

    The expert lives in one event loop for the whole round, so it may keep connections and limits of its own. Raises
    SilentExpert where it has been asked, and `patience` seconds have gone by without an answer.
    """

    def __init__(self, expert: Expert, journal: Journal, bar: tqdm, *, patience: float) -> None:
        self.expert, self.journal, self.bar, self.patience = expert, journal, bar, patience
        self._heard = time.monotonic()
        self._asked: list[Future] = []
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="expert", daemon=True)

    def __enter__(self) -> ExpertThread:
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                for future in self._asked:
                    self._wait(future)
        finally:
            self._end()

    def ask(self, drafts: Sequence[Draft]) -> None:
        """Hand over drafts without waiting. Raises what the expert raised about earlier ones."""
        for future in self._asked:
            if future.done():
                future.result()
        if all(future.done() for future in self._asked):
            self._heard = time.monotonic()  # nothing was asked of it until now
        elif time.monotonic() - self._heard > self.patience:
            raise self._silent()
        self._asked.append(asyncio.run_coroutine_threadsafe(self._collect(drafts), self._loop))

    def _wait(self, future: Future) -> None:
        while not future.done():
            left = self._heard + self.patience - time.monotonic()
            if left <= 0:
                raise self._silent()
            wait([future], timeout=min(left, 1.0) + 0.01)
        future.result()

    def _silent(self) -> SilentExpert:
        return SilentExpert(
            f"expert {self.expert.name} has not answered for {self.patience:.0f} s; its {len(self.journal)} answers "
            "are kept, and the same command continues"
        )

    def _end(self) -> None:
        """End the thread. One that its expert blocks is left behind, and ends with the process."""
        try:
            asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result(timeout=LEAVE)
        except TimeoutError:
            logger.warning("expert %s does not let go of its thread", self.expert.name)
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel(self) -> None:
        """End what still runs; after an error, that is all chunks without answers."""
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    async def _collect(self, drafts: Sequence[Draft]) -> None:
        unsettled = {draft.key: draft for draft in drafts if not self.journal.is_settled(draft)}
        self.bar.update(len(drafts) - len(unsettled))
        if not unsettled:
            return
        async for key, answer in self.expert.revise(list(unsettled.values())):
            if key not in unsettled:
                raise ValueError(f"expert {self.expert.name} answered {key!r} twice, or without being asked")
            self.journal.add(unsettled.pop(key), answer)
            self._heard = time.monotonic()
            self.bar.update()
