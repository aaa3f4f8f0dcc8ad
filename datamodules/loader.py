"""A loader of batches that can resume at any batch, on several ranks and with several workers.

    Loader([Part(stream, rows=64, advance=12000, per_rank=11968)], collate, batches=187, epoch=lambda: 3, ...)

    epoch of the stream -> equal contiguous ranges per rank -> contiguous ranges per worker -> batches

Each batch takes `rows` samples of every part, so a fixed fraction of it can come from another stream. All ranks yield
the same number of batches. A resumed loader continues at the batch of its state and repeats no sample: as the
DataLoader always starts with its worker 0, it rotates the workers by the number of consumed batches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from threading import Thread
from typing import Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.shards import Reader, Sample
from datamodules.stream import Stream
from src.io.errors import UserError
from src.types import Batch

log = logging.getLogger(__name__)

Notes = Counter[tuple[str, str]]  # number of samples per (place, reason)
PATIENCE = 1.0  # seconds between a worker's checks that its parent is alive
ADVICE = {
    "missing": "{where} is truncated and lacks samples; copy or make it again",
    "unreadable": "{where} cannot be read (any more): its samples are skipped; check the disk or the server",
    "damaged": "{where} holds damaged samples, which are skipped; copy or make it again",
    "misfit": "{where}. Such samples are skipped; make the data again",
    "cut": "some responses exceed the response length of {where} tokens and were cut; set a larger response length",
}


@dataclass(frozen=True)
class Part:
    """The samples that a loader takes from one stream.

    rows:     samples in each batch
    advance:  positions of the stream from the start of one epoch to the start of the next
    per_rank: samples of one rank in an epoch; the last batch may be smaller
    start:    positions to skip at the start of the epoch
    stand_in: replace damaged samples by others instead of leaving them out
    """

    stream: Stream
    rows: int
    advance: int
    per_rank: int
    stand_in: bool = True
    start: int = 0


class Collate(Protocol):
    def __call__(self, samples: list[Sample]) -> tuple[Batch, Notes]: ...

    def misfit(self, sample: Sample) -> str | None: ...


@dataclass(eq=False)
class Loader:
    """Batches of one epoch; each pass over the loader calls `epoch()` for its number.

    notes:   counts of damaged samples and cut responses, shared by loaders
    restart: start the epoch over if it cannot be resumed at the checkpoint's batch

    Raises UserError at the first batch of an epoch that cannot be resumed: with other data, batches, ranks or workers
    the same position would mean other samples.
    """

    parts: Sequence[Part]
    collate: Collate
    _: KW_ONLY
    batches: int
    epoch: Callable[[], int]
    notes: Notes
    workers: int = 0
    rank: int = 0
    world: int = 1
    restart: bool = False
    _position: tuple[int, int] | None = field(default=None, init=False)  # (epoch, batches yielded)
    _resume: dict | None = field(default=None, init=False)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        """A generator, so the resume point is not consumed before the first batch is requested."""
        epoch = self.epoch()
        done = self._resume_point(epoch)
        self._resume, self._position = None, (epoch, done)
        loader = DataLoader(
            _Source(self, epoch, done),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # otherwise the DataLoader draws its seed from the global generator
        )
        for batch, notes in loader:
            for where, reason, count in notes:
                if (where, reason) not in self.notes:
                    log.warning(ADVICE[reason].format(where=where))
                self.notes[where, reason] += count
            done += 1
            self._position = (epoch, done)
            if batch is not None:
                yield batch
            elif self.world > 1:  # the other ranks would wait forever
                damaged = ", ".join(sorted({where for where, reason in self.notes if reason != "cut"}))
                raise UserError(f"no sample of a batch could be read ({damaged}); copy or make the data again")

    def numbered(self, first: int) -> Iterator[tuple[int, Batch]]:
        """(number, batch), counted from `first`. A batch with damaged samples only is skipped, but keeps its number."""
        for batch in self:
            assert self._position is not None
            yield first + self._position[1] - 1, batch

    @property
    def plan(self) -> str:
        """Hash of everything except the epoch that determines the samples of a batch."""
        streams = [(p.stream.digests, p.stream.seed, [s.count for s in p.stream.shards]) for p in self.parts]
        sizes = [(p.rows, p.advance, p.per_rank) for p in self.parts]
        state = json.dumps([streams, sizes, self.batches, self.world, self.workers])
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    def state_dict(self) -> dict:
        if self._position is None and self._resume:
            return self._resume
        epoch, done = self._position or (self.epoch(), 0)
        position = {"epoch": epoch, "batches": done, "of": self.batches}
        return {**position, "plan": self.plan, "world": self.world, "workers": self.workers}

    def load_state_dict(self, state: dict) -> None:
        self._resume, self._position = dict(state), None

    def _resume_point(self, epoch: int) -> int:
        """The batches of the epoch that the checkpoint has seen."""
        if self._resume is None or self._resume["epoch"] != epoch:
            return 0
        if self._resume["batches"] >= self._resume["of"]:  # finished, even if rounds were added since
            return self.batches
        if self._resume["plan"] == self.plan or not self._resume["batches"]:
            return self._resume["batches"]
        difference = "other data, batches or seed than now"
        for name, label, current in (("world", "processes", self.world), ("workers", "data.workers", self.workers)):
            if (saved := self._resume.get(name, current)) != current:
                difference = f"{saved} {label}, and now there are {current}"
        message = f"the checkpoint is from the middle of epoch {epoch}, with {difference}"
        if not self.restart:
            raise UserError(
                f"{message}: resume with the same setup, or set data.restart_epoch=true to start that epoch over, "
                "which repeats samples that it has seen before"
            )
        log.warning("%s: that epoch starts over", message)
        return 0


class _Source(IterableDataset):
    """The batches of one worker: its range of the rank's batches, from the first one not yet consumed."""

    def __init__(self, loader: Loader, epoch: int, done: int) -> None:
        self.parts, self.collate, self.batches = loader.parts, loader.collate, loader.batches
        self.rank, self.epoch, self.done = loader.rank, epoch, done

    def __iter__(self) -> Iterator[tuple[Batch | None, list[tuple[str, str, int]]]]:
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        first, last = share(self.batches, workers, (number + self.done) % workers, self.done)
        readers, streams = [], []
        for part in self.parts:
            reader = Reader(part.stream, stand_in=part.stand_in, misfit=self.collate.misfit)
            origin = self.epoch * part.advance + part.start + self.rank * part.per_rank
            stop = min(last * part.rows, part.per_rank)
            readers.append(reader)
            streams.append(reader.samples(origin + first * part.rows, origin + stop))
        for _ in range(first, last):
            samples = []
            for stream, part in zip(streams, self.parts, strict=True):
                samples += islice(stream, part.rows)
            batch, notes = self.collate(samples) if samples else (None, Counter())
            for reader in readers:
                notes.update(reader.damage)
                reader.damage.clear()
            yield batch, [(where, reason, count) for (where, reason), count in notes.items()]


def init_worker(_: int) -> None:
    """Make a worker end with its parent or at the parent's SIGTERM, and ignore signals sent to all processes of a run.

    WARN: PyTorch's own workers notice that the parent is gone, but may then block forever while sending a batch.
    """
    parent = os.getppid()

    def exit_with_parent() -> None:
        while os.getppid() == parent:
            if sys.platform != "linux":
                time.sleep(PATIENCE)
            elif (info := signal.sigtimedwait([signal.SIGTERM], PATIENCE)) and info.si_pid == parent:
                break
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere the sender of a signal is unknown
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    Thread(target=exit_with_parent, daemon=True).start()


def share(batches: int, workers: int, worker: int, done: int) -> tuple[int, int]:
    """The range of batches that a worker still has to make, after `done` were taken round-robin.

    Worker w delivers the batches whose index in the epoch is w modulo `workers`; its data are contiguous.
    """
    sizes = [len(range(w, batches, workers)) for w in range(workers)]
    start = sum(sizes[:worker])
    return start + len(range(worker, done, workers)), start + sizes[worker]


def _identity(item):
    return item
