"""One thread that runs the sampler, on batches of the requests that wait.

    with Engine(captioner, batch_size=16, max_waiting=64) as engine:
        engine.submit(job := Job(sample=sample, sampler=sampler, seed=0, watched=True))     Refused if too many wait
        while isinstance(event := await job.events.get(), TraceStep): ...
        event                                                                   a `Caption`, or why there is none

    event loop: submit -> waiting -> thread: those with the first one's sampler, at most batch_size -> events

A batch starts as soon as the last one is done, with all that has come in since: a lone request waits for nobody, many
share forward calls. Noise belongs to the sample, so an answer does not depend on its batch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Thread

from datamodules.shards import Sample
from src.generation.captioner import Caption, Captioner
from src.io.errors import UserError
from src.samplers.base import AnySampler, traces_of
from src.serving.protocol import Refused
from src.types import TraceStep

logger = logging.getLogger(__name__)
Event = TraceStep | Caption | Refused


@dataclass(eq=False, kw_only=True)
class Job:
    """A request on its way, made in the event loop. watched: whether `events` get every step"""

    sample: Sample
    sampler: AnySampler
    seed: int
    watched: bool
    cancelled: bool = False
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def send(self, event: Event) -> None:
        """Called in the thread."""
        with suppress(RuntimeError):  # the loop of a server that was told to stop at once is closed
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Engine:
    """counts: requests `answered`, and `batches`."""

    def __init__(self, captioner: Captioner, *, batch_size: int, max_waiting: int) -> None:
        if min(batch_size, max_waiting) < 1:
            raise UserError(f"batch_size and max_waiting must be at least 1, got {batch_size} and {max_waiting}")
        self.captioner, self.batch_size, self.max_waiting = captioner, batch_size, max_waiting
        self.waiting: list[Job] = []
        self.counts: Counter[str] = Counter()
        self._changed, self._stopping = Condition(), False
        self._thread = Thread(target=self._work, name="sampler", daemon=True)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends once what waits is answered."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def check_room(self) -> None:
        """Raises Refused if too many requests wait."""
        if len(self.waiting) >= self.max_waiting:
            raise Refused(429, f"{self.max_waiting} requests wait already; try again later", code="queue_full")

    def submit(self, job: Job) -> None:
        with self._changed:
            self.check_room()
            self.waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Its client is gone, or has its answer. A batch of which all are cancelled stops after its current step."""
        job.cancelled = True
        with self._changed:
            self.waiting = [other for other in self.waiting if other is not job]

    def _work(self) -> None:
        while batch := self._next_batch():
            self.counts["batches"] += 1
            try:
                events: Sequence[Event] = self._captions(batch)
                self.counts["answered"] += len(events)
            except UserError as error:  # settings that the sampler cannot combine
                events = [Refused(400, str(error), code="invalid_value")] * len(batch)
            except Exception:
                logger.exception("a batch of %d failed", len(batch))
                events = [Refused(500, "the server failed to answer; its log says why", code="internal")] * len(batch)
            for job, event in zip(batch, events, strict=False):
                job.send(event)

    def _next_batch(self) -> list[Job]:
        """Waits for requests; empty once the engine stops."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self._stopping)
            batch = [job for job in self.waiting if job.sampler == self.waiting[0].sampler][: self.batch_size]
            self.waiting = [job for job in self.waiting if job not in batch]
            return batch

    def _captions(self, batch: Sequence[Job]) -> list[Caption]:
        """A caption for each, of which those who watch get every step; empty if nobody is there any more."""
        samples, seeds = [job.sample for job in batch], [job.seed for job in batch]
        steps = self.captioner.steps(samples, sampler=batch[0].sampler, seed=seeds)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return self.captioner.captions_of(end.value)
            if all(job.cancelled for job in batch):
                steps.close()
                return []
            rows = traces_of([step], len(batch)) if any(job.watched for job in batch) else []
            for job, row in zip(batch, rows, strict=False):
                if job.watched and row:
                    job.send(row[0])
