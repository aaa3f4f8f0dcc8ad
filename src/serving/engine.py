"""One thread that runs the sampler, on batches of the requests that wait.

    with Engine(captioner, batch_size=16, max_waiting=64) as engine:
        job = engine.submit(sample, sampler, seed=0, watched=True)        raises Refused if too many wait
        while isinstance(event := await job.events.get(), TraceStep): ...
        event                                                             a `Written`, or a `Refused`

    event loop: submit -> waiting -> thread: those with the first one's sampler, at most batch_size -> events

A batch starts as soon as the last one is done, with all that has come in since: a lone request waits for nobody, many
together share forward calls. Noise belongs to the sample, so its answer does not depend on its batch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, Thread

from datamodules.shards import Sample
from src.generation.captioner import Captioner
from src.io.errors import UserError
from src.samplers.base import AnySampler, traces_of
from src.serving.protocol import Refused
from src.types import Sampled, TraceStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """A finished response. ids: (L,), with eot and filler; edits: tokens that the sampler rewrote"""

    ids: list[int]
    forward_calls: int
    edits: int


class Job:
    """A request on its way; created in the event loop. watched: whether `events` get every step"""

    def __init__(self, sample: Sample, sampler: AnySampler, *, seed: int, watched: bool) -> None:
        self.sample, self.sampler, self.seed, self.watched = sample, sampler, seed, watched
        self.events: asyncio.Queue[TraceStep | Written | Refused] = asyncio.Queue()
        self.cancelled = False
        self._loop = asyncio.get_running_loop()

    def send(self, event: TraceStep | Written | Refused) -> None:
        """Called in the thread."""
        with suppress(RuntimeError):  # the event loop of a server that was told to stop at once is closed
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class Engine:
    """counts: `answered` requests, `batches`, `failed` batches."""

    def __init__(self, captioner: Captioner, *, batch_size: int, max_waiting: int) -> None:
        for name, value in (("batch_size", batch_size), ("max_waiting", max_waiting)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
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

    def submit(self, sample: Sample, sampler: AnySampler, *, seed: int, watched: bool) -> Job:
        job = Job(sample, sampler, seed=seed, watched=watched)
        with self._changed:
            self.check_room()
            self.waiting.append(job)
            self._changed.notify()
        return job

    def check_room(self) -> None:
        """Raises Refused if too many requests wait."""
        if len(self.waiting) >= self.max_waiting:
            raise Refused(429, f"{self.max_waiting} requests wait already; try again later", code="queue_full")

    def cancel(self, job: Job) -> None:
        """Its client is gone, or has its answer. A batch of which all are cancelled stops after its current step."""
        job.cancelled = True
        with self._changed:
            self.waiting = [other for other in self.waiting if other is not job]

    def _work(self) -> None:
        while batch := self._next_batch():
            self.counts["batches"] += 1
            try:
                sampled = self._sample(batch)
            except UserError as error:  # settings that the sampler cannot combine
                events = [Refused(400, str(error), code="invalid_value")] * len(batch)
            except Exception:
                logger.exception("a batch of %d requests failed", len(batch))
                self.counts["failed"] += 1
                events = [Refused(500, "the server failed to answer; its log says why", code="internal")] * len(batch)
            else:
                if sampled is None:
                    continue
                self.counts["answered"] += len(batch)
                values = (sampled.ids.tolist(), sampled.forwards.tolist(), sampled.edits.tolist())
                events = [Written(*row) for row in zip(*values, strict=True)]
            for job, event in zip(batch, events, strict=True):
                job.send(event)

    def _next_batch(self) -> list[Job]:
        """Waits for requests; empty once the engine stops."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self._stopping)
            same = [job for job in self.waiting if job.sampler == self.waiting[0].sampler][: self.batch_size]
            self.waiting = [job for job in self.waiting if job not in same]
            return same

    def _sample(self, batch: Sequence[Job]) -> Sampled | None:
        """The responses; None if nobody is there any more to read them."""
        samples, seeds = [job.sample for job in batch], [job.seed for job in batch]
        steps = self.captioner.steps(samples, sampler=batch[0].sampler, seed=seeds)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return end.value
            if all(job.cancelled for job in batch):
                steps.close()
                return None
            if any(job.watched for job in batch):
                for job, row in zip(batch, traces_of([step], len(batch)), strict=True):
                    if job.watched and row:
                        job.send(row[0])
