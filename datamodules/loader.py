"""A loader of batches that can resume at any batch, on several ranks and with several workers.

    Loader([Part(stream, rows=64, per_rank=11968)], collate, batches=187, epoch=lambda: 3, ...)

    epoch of the stream -> equal contiguous ranges per rank -> windows of batches, sorted by length -> batches

Each batch takes `rows` samples of every part, so a fixed fraction of it can come from another stream. All ranks yield
the same number of batches. Workers take turns, so their number changes nothing. A resumed loader continues at the batch
of its state; if the number of ranks has changed, what is left of the epoch is dealt out anew (`Stage`).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from random import Random
from threading import Thread
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.shards import Reader, Sample
from datamodules.stream import Place, Shard, Stream
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
    "cut": "some responses have more than data.response_length={where} tokens and are cut; set a larger one",
}


@dataclass(frozen=True)
class Part:
    """The samples that a loader takes from one stream.

    rows:     samples in each batch
    per_rank: samples of one rank in an epoch; the last batch may be smaller
    stand_in: replace damaged samples by others instead of leaving them out
    start:    position of the stream at which epoch 0 begins; each epoch begins where the one before has ended
    """

    stream: Stream
    rows: int
    per_rank: int
    stand_in: bool = True
    start: int = 0


Span = tuple[int, int]  # positions of a stream, from the first to the one after the last


@dataclass
class Stage:
    """The batches of an epoch from number `first` on, dealt out to `world` ranks.

    spans:  for each part, the positions that are read, in order; each rank gets an equal range of them
    bucket: so many consecutive batches of a rank are sorted by `length` (of a sample, None if unknown)
    """

    parts: Sequence[Part]
    spans: list[list[Span]]
    world: int
    first: int
    epoch: int
    bucket: int
    length: Callable[[Shard, int], int | None] | None

    @property
    def stop(self) -> int:
        """Number of the batch after the last one."""
        return self.first + -(-self._per_rank(-1) // self.parts[-1].rows)

    def window(self, rank: int, number: int) -> tuple[int, list[list[list[Place]]]]:
        """The batches that are sorted together with batch `number`, after the number of the first of them.

        Each holds, for each part, its samples. A window of equal or unknown lengths keeps its order. Otherwise its
        batches are permuted, on all ranks alike: in each step the ranks get batches of about the same length.
        """
        begin = number - (number - self.first) % self.bucket
        num = min(self.bucket, self.stop - begin)
        turns, columns = list(range(num)), []
        for index, part in enumerate(self.parts):
            places = self._places(index, rank, begin, begin + num)
            lengths = [self.length(place.shard, place.index) for place in places] if self.length and num > 1 else []
            known = [length for length in lengths if length is not None]
            order = range(len(places))
            if len(known) == len(places) and len(set(known)) > 1:
                order = sorted(order, key=known.__getitem__)
                turns = Random(f"{part.stream.seed}/{self.epoch}/{begin}/turns").sample(range(num), num)
            groups = [sorted(order[n * part.rows : (n + 1) * part.rows]) for n in range(num)]
            columns.append((places, groups))
        batches = [list[list[Place]]() for _ in range(num)]
        for places, groups in columns:
            positions = (place.position for place in places)
            for n, turn in enumerate(turns):
                batches[n].append([replace(places[i], turn=next(positions)) for i in groups[turn]])
        return begin, batches

    def rest(self, done: int) -> list[list[Span]]:
        """For each part, the positions that the batches from number `done` on read."""
        left = [list[Span]() for _ in self.parts]
        for rank in range(self.world):
            begin, window = self.window(rank, done)
            for index, part in enumerate(self.parts):
                positions = sorted(place.position for batch in window[done - begin :] for place in batch[index])
                after = (begin + len(window) - self.first) * part.rows
                left[index] += [(position, position + 1) for position in positions]
                left[index] += self._cut(index, rank, after, self._per_rank(index))
        return [joined(spans) for spans in left]

    def _per_rank(self, index: int) -> int:
        return size(self.spans[index]) // self.world

    def _places(self, index: int, rank: int, first: int, last: int) -> list[Place]:
        part = self.parts[index]
        low, high = ((number - self.first) * part.rows for number in (first, last))
        spans = self._cut(index, rank, low, high)
        return [place for start, stop in spans for place in part.stream.places(start, stop)]

    def _cut(self, index: int, rank: int, low: int, high: int) -> list[Span]:
        """The samples `low` to `high` of those of a rank."""
        per_rank = self._per_rank(index)
        return cut(self.spans[index], rank * per_rank + low, rank * per_rank + min(high, per_rank))


def size(spans: Sequence[Span]) -> int:
    return sum(stop - start for start, stop in spans)


def cut(spans: Sequence[Span], low: int, high: int) -> list[Span]:
    """The positions `low` to `high` of those of the spans."""
    pieces, begin = [], 0
    for start, stop in spans:
        piece = start + max(0, low - begin), min(stop, start + high - begin)
        if piece[0] < piece[1]:
            pieces.append(piece)
        begin += stop - start
    return pieces


def joined(spans: Sequence[Span]) -> list[Span]:
    """The same positions, adjacent spans as one."""
    whole = list[Span]()
    for start, stop in spans:
        if whole and whole[-1][1] == start:
            start = whole.pop()[0]
        whole.append((start, stop))
    return whole


class Collate(Protocol):
    def __call__(self, samples: list[Sample]) -> tuple[Batch, Notes]: ...

    def misfit(self, sample: Sample) -> str | None: ...


@dataclass(eq=False)
class Loader:
    """Batches of one epoch; each pass over the loader calls `epoch()` for its number.

    batches: in an epoch on each rank; of one that is resumed with other ranks only if `fixed`
    notes:   counts of damaged samples and cut responses, shared by loaders
    bucket, length: see `Stage`

    Raises UserError at the first batch of an epoch that cannot be resumed: with other data or batches the same position
    would mean other samples.
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
    fixed: bool = False
    bucket: int = 1
    length: Callable[[Shard, int], int | None] | None = None
    _position: tuple[Stage, int] | None = field(default=None, init=False)  # and the batches yielded
    _resume: dict | None = field(default=None, init=False)

    def __len__(self) -> int:
        epoch = self.epoch()
        if self._position and self._position[0].epoch == epoch:
            return self._position[0].stop
        return self._begin(epoch)[0].stop

    def __iter__(self) -> Iterator[Batch]:
        """A generator, so the resume point is not consumed before the first batch is requested."""
        stage, done = self._begin(self.epoch())
        self._resume, self._position = None, (stage, done)
        loader = DataLoader(
            _Source(stage, self.rank, done, self.collate),
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
            self._position = (stage, done)
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
    def plan(self) -> dict[str, Any]:
        """Everything but epoch and ranks that determines the samples of a batch."""
        streams = [part.stream for part in self.parts]
        return {
            "data": [[digest[:12] for digest in stream.digests] for stream in streams],
            "samples": [stream.sizes for stream in streams],
            "weights": [stream.weights for stream in streams],
            "seed": [stream.seed for stream in streams],
            "rows": [part.rows for part in self.parts],
            "bucket": self.bucket,
            "epoch_batches": self.batches if self.fixed else None,
        }

    def state_dict(self) -> dict:
        """counts: samples in a pass of each part, which depend on the ranks with which the epoch began."""
        if self._position is None and self._resume:
            return self._resume
        stage, done = self._position or self._begin(self.epoch())
        return {
            "epoch": stage.epoch,
            "batches": done,
            "of": stage.stop,
            "world": stage.world,
            "first": stage.first,
            "spans": [[list(span) for span in spans] for spans in stage.spans],
            "counts": [part.stream.count for part in stage.parts],
            "plan": self.plan,
        }

    def load_state_dict(self, state: dict) -> None:
        self._resume, self._position = dict(state), None

    def _begin(self, epoch: int) -> tuple[Stage, int]:
        """What an epoch reads, and the number of its batches that the checkpoint has seen."""
        whole = [part.per_rank * self.world for part in self.parts]
        starts = [part.start + epoch * num for part, num in zip(self.parts, whole, strict=True)]
        spans = [[(start, start + num)] for start, num in zip(starts, whole, strict=True)]
        fresh = Stage(self.parts, spans, self.world, 0, epoch, self.bucket, self.length)
        saved = self._resume
        if saved is None or saved["epoch"] != epoch or not saved["batches"]:
            return fresh, 0
        done = saved["batches"]
        if done >= saved["of"]:  # finished, even if rounds were added since
            return fresh, fresh.stop
        changed = [
            f"{name} {saved['plan'].get(name)} -> {now}"
            for name, now in self.plan.items()
            if saved["plan"].get(name) != now
        ]
        if changed:
            raise UserError(
                f"the checkpoint is from the middle of epoch {epoch}, with other settings or data than now "
                f"({'; '.join(changed)}): resume with those of before, or begin another run"
            )
        # 1. what the checkpoint was reading
        parts = [
            replace(part, stream=part.stream.resized(count))
            for part, count in zip(self.parts, saved["counts"], strict=True)
        ]
        spans = [[(start, stop) for start, stop in spans] for spans in saved["spans"]]
        stage = replace(fresh, parts=parts, spans=spans, world=saved["world"], first=saved["first"])
        if stage.world == self.world:
            return stage, done
        # 2. What is left of it, dealt out anew. It is filled up with the positions that follow.
        left, rows = stage.rest(done), parts[-1].rows * self.world
        steps = self.batches - done if self.fixed else -(-size(left[-1]) // rows)
        for index, part in enumerate(parts):
            end, num = max(stop for _, stop in stage.spans[index]), steps * part.rows * self.world
            left[index] = cut([*left[index], (end, end + num)], 0, num)
        return replace(stage, spans=left, world=self.world, first=done), done


class _Source(IterableDataset):
    """The batches of one worker, from the first one not yet consumed."""

    def __init__(self, stage: Stage, rank: int, done: int, collate: Collate) -> None:
        self.stage, self.rank, self.done, self.collate = stage, rank, done, collate

    def __iter__(self) -> Iterator[tuple[Batch | None, list[tuple[str, str, int]]]]:
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        readers = [Reader(p.stream, stand_in=p.stand_in, misfit=self.collate.misfit) for p in self.stage.parts]
        begin, window = 0, []
        for batch_number in range(self.done + number, self.stage.stop, workers):
            if not begin <= batch_number < begin + len(window):
                begin, window = self.stage.window(self.rank, batch_number)
            samples = []
            for reader, places in zip(readers, window[batch_number - begin], strict=True):
                samples += reader.samples(places)
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


def _identity(item):
    return item
