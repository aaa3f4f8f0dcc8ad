"""A loader of batches that can be stopped and resumed anywhere, on several ranks and with several workers.

    Loader([Part(stream, rows=64, advance=12000, per_rank=11968)], collate, batches=187, epoch=lambda: 3, ...)

    epoch of the stream -> equal contiguous ranges of the ranks -> contiguous shares of the workers -> batches

Each batch takes `rows` samples of every part, so a fixed share of it can come from another stream. All ranks
yield the same number of batches. State: {epoch, batches, of, plan}; a resumed loader enters the stream at the
right place and reads nothing twice. As the DataLoader always asks its first worker first, the workers are
rotated by the batches already consumed.
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
from dataclasses import dataclass
from itertools import islice
from threading import Thread
from typing import Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.shards import Reader, Sample, Stream
from src.io.errors import UserError
from src.types import Batch

log = logging.getLogger(__name__)

Notes = Counter[tuple[str, str]]  # how often (where, reason) happened
PATIENCE = 1.0  # seconds until a worker notices that its parent is gone
ADVICE = {
    "missing": "{where} ends too early: some samples are lost; copy or make it again",
    "damaged": "{where} holds damaged samples, which are not used; copy or make it again",
    "misfit": "{where}. Such samples are not used; make the data again",
    "cut": "some responses are longer than the response length of {where} tokens and were cut; set a larger response length",
}


@dataclass(frozen=True)
class Part:
    """What a loader takes from one stream.

    rows:     samples in each batch
    advance:  positions of the stream from the start of one epoch to the start of the next
    per_rank: samples of one rank in an epoch; where the last batch would need more, it is smaller
    start:    positions of the epoch that are left out
    stand_in: others take the place of damaged samples; without, there are fewer samples at the end
    """

    stream: Stream
    rows: int
    advance: int
    per_rank: int
    stand_in: bool = True
    start: int = 0

    def samples(self, reader: Reader, origin: int, first: int, last: int) -> Iterator[Sample]:
        """The samples of batches `first` to `last` (exclusive) of the rank whose range starts at `origin`."""
        return reader.samples(origin + first * self.rows, origin + min(last * self.rows, self.per_rank))


class Collate(Protocol):
    """Makes a batch of samples, and says why a sample cannot be in one."""

    def __call__(self, samples: list[Sample], epoch: int) -> tuple[Batch, Notes]: ...

    def misfit(self, sample: Sample) -> str | None: ...


class Loader:
    """Batches of one epoch. Which epoch is asked for anew at the start of each pass over the loader.

    collate: (samples, epoch) -> (Batch, notes); notes: counts what went wrong, for all loaders
    restart: start an epoch anew where it cannot be entered at the place that a checkpoint has left it

    Raises UserError at the first batch of an epoch that cannot be entered there: with other data, batches, ranks or
    workers the place means other samples.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        collate: Collate,
        *,
        batches: int,
        epoch: Callable[[], int],
        notes: Notes,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        restart: bool = False,
    ) -> None:
        self.parts, self.collate, self.batches, self.epoch = tuple(parts), collate, batches, epoch
        self.notes, self.workers, self.rank, self.world = notes, workers, rank, world
        self.restart = restart
        self._position: tuple[int, int] | None = None  # (epoch, batches handed out)
        self._resume: dict | None = None

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        """Lazy: nothing happens, and no resume point is used up, before the first batch is asked for."""
        epoch = self.epoch()
        done = self._resume_point(epoch)
        self._resume, self._position = None, (epoch, done)
        for batch, notes in self._raw(epoch, done):
            self._note(notes)
            done += 1
            self._position = (epoch, done)
            if batch is not None:
                yield batch
            elif self.world > 1:  # the others would wait for ever
                damaged = ", ".join(sorted({where for where, reason in self.notes if reason != "cut"}))
                raise UserError(f"no sample of a batch could be read ({damaged}); copy or make the data again")

    def numbered(self, first: int) -> Iterator[tuple[int, Batch]]:
        """(number, batch), counted from `first`. One of damaged samples only has a number too, but does not come."""
        for batch in self:
            assert self._position is not None
            yield first + self._position[1] - 1, batch

    @property
    def plan(self) -> str:
        """Hash of all that decides which samples a batch holds, apart from the epoch."""
        streams = [(p.stream.digests, p.stream.seed, [s.count for s in p.stream.shards]) for p in self.parts]
        sizes = [(p.rows, p.advance, p.per_rank) for p in self.parts]
        state = json.dumps([streams, sizes, self.batches, self.world, self.workers])
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    def state_dict(self) -> dict:
        if self._position is None:
            return self._resume or self._state(self.epoch(), 0)
        return self._state(*self._position)

    def load_state_dict(self, state: dict) -> None:
        self._resume, self._position = dict(state), None

    def _state(self, epoch: int, done: int) -> dict:
        place = {"epoch": epoch, "batches": done, "of": self.batches}
        return {**place, "plan": self.plan, "world": self.world, "workers": self.workers}

    def _resume_point(self, epoch: int) -> int:
        if self._resume is None or self._resume["epoch"] != epoch:
            return 0
        if self._resume["batches"] >= self._resume["of"]:  # finished, whatever data have come since
            return self.batches
        if self._resume["plan"] == self.plan or not self._resume["batches"]:
            return self._resume["batches"]
        told = f"the checkpoint is from the middle of epoch {epoch}, with {self._difference(self._resume)}"
        if not self.restart:
            raise UserError(
                f"{told}: go on as it was, or set data.restart_epoch=true to start that epoch anew, on samples that it "
                "has seen before"
            )
        log.warning("%s: that epoch starts anew", told)
        return 0

    def _difference(self, state: dict) -> str:
        for name, what, mine in (("world", "processes", self.world), ("workers", "data.workers", self.workers)):
            if state.get(name, mine) != mine:
                return f"{state[name]} {what}, and now there are {mine}"
        return "other data, batches or seed than now"

    def _raw(self, epoch: int, done: int) -> DataLoader:
        source = _Source(self, epoch, done)
        own = torch.Generator()  # the DataLoader would otherwise draw its seed from the global generator
        pin = torch.cuda.is_available()
        settings = {"generator": own, "pin_memory": pin, "worker_init_fn": begin_worker}
        return DataLoader(source, batch_size=None, num_workers=self.workers, collate_fn=_same, **settings)

    def _note(self, notes: list[tuple[str, str, int]]) -> None:
        for where, reason, count in notes:
            if (where, reason) not in self.notes:
                log.warning(ADVICE[reason].format(where=where))
            self.notes[where, reason] += count


class _Source(IterableDataset):
    """What runs in a worker: its share of the rank's batches, from the first one not yet consumed."""

    def __init__(self, loader: Loader, epoch: int, done: int) -> None:
        self.parts, self.collate, self.batches = loader.parts, loader.collate, loader.batches
        self.rank, self.epoch, self.done = loader.rank, epoch, done

    def __iter__(self) -> Iterator[tuple[Batch | None, list[tuple[str, str, int]]]]:
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        first, last = share(self.batches, workers, (number + self.done) % workers, self.done)
        misfit = self.collate.misfit
        readers = [Reader(part.stream, stand_in=part.stand_in, misfit=misfit) for part in self.parts]
        origins = [self.epoch * p.advance + p.start + self.rank * p.per_rank for p in self.parts]
        streams = [p.samples(r, o, first, last) for p, r, o in zip(self.parts, readers, origins, strict=True)]
        for _ in range(first, last):
            rows = [list(islice(stream, part.rows)) for stream, part in zip(streams, self.parts, strict=True)]
            samples = [sample for some in rows for sample in some]
            batch, notes = self.collate(samples, self.epoch) if samples else (None, Counter())
            for reader in readers:
                notes.update(reader.damage)
                reader.damage.clear()
            yield batch, [(where, reason, count) for (where, reason), count in notes.items()]


def begin_worker(_: int) -> None:
    """A worker ends when its parent has or wants it to, and not by a signal to all processes of a run.

    The DataLoader's own workers notice that the parent is gone, but may then wait for ever to hand over a batch.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # else nothing tells who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process at the parent's end, or at its SIGTERM."""
    while os.getppid() == parent:
        if sys.platform != "linux":
            time.sleep(PATIENCE)
        elif (told := signal.sigtimedwait([signal.SIGTERM], PATIENCE)) and told.si_pid == parent:
            break
    os._exit(0)


def share(batches: int, workers: int, worker: int, done: int) -> tuple[int, int]:
    """The range of batches that a worker still has to make, after `done` were taken from the workers in turn.

    Worker w delivers the batches whose place in the epoch is w modulo `workers`; its data are contiguous.
    """
    sizes = [len(range(w, batches, workers)) for w in range(workers)]
    start = sum(sizes[:worker])
    return start + len(range(worker, done, workers)), start + sizes[worker]


def _same(item):
    return item
