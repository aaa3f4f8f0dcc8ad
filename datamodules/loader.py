"""A loader of batches that can resume at any batch, on several ranks and with several workers.

    Loader([Part(stream, rows=64, per_rank=11968)], collate, batches=187, epoch=lambda: 3, ...)

    unread positions of a stream -> an equal share of them for each rank -> windows, sorted by length -> batches

Each batch takes `rows` samples of every part, so a fixed fraction of it can come from another stream. All ranks yield
the same number of batches. Workers take turns, so their number changes nothing. A resumed loader continues at the batch
of its state; if the number of ranks has changed, what is unread is dealt out anew (`Deal`).
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


Positions = list[range]  # of a stream, in the order in which they are read


@dataclass
class Deal:
    """The batches of an epoch from number `first` on, dealt out to `world` ranks.

    unread: for each part, the positions that no batch before has read, without end; of the first of them each rank
            gets `per_rank`, in one piece
    bucket: so many consecutive batches of a rank are sorted by `length` (of a sample, None if unknown)
    """

    parts: Sequence[Part]
    unread: list[Positions]
    world: int
    first: int
    epoch: int
    bucket: int
    length: Callable[[Shard, int], int | None] | None

    @property
    def stop(self) -> int:
        """Number of the batch after the last one."""
        return self.first + -(-self.parts[-1].per_rank // self.parts[-1].rows)

    def window(self, rank: int, number: int) -> tuple[int, list[list[list[Place]]]]:
        """The batches that are sorted together with batch `number`, after the number of the first of them.

        Each holds, for each part, its samples. A window of equal or unknown lengths keeps its order. Otherwise its
        batches are permuted, on all ranks alike: in each step the ranks get batches of about the same length.
        """
        begin = number - (number - self.first) % self.bucket
        num = min(self.bucket, self.stop - begin)
        places = [self._places(index, rank, begin, begin + num) for index in range(len(self.parts))]
        orders = [self._by_length(of_part) if num > 1 else None for of_part in places]
        turns = range(num)
        if any(orders):
            turns = Random(f"{self.parts[0].stream.seed}/{self.epoch}/{begin}/turns").sample(turns, num)
        batches = [list[list[Place]]() for _ in range(num)]
        for part, of_part, order in zip(self.parts, places, orders, strict=True):
            positions = (place.position for place in of_part)
            for batch, turn in zip(batches, turns, strict=True):
                group = (order or range(len(of_part)))[turn * part.rows : (turn + 1) * part.rows]
                batch.append([replace(of_part[i], turn=next(positions)) for i in sorted(group)])
        return begin, batches

    def unread_at(self, done: int) -> list[Positions]:
        """For each part, the positions that the batches before number `done` do not read, on any rank."""
        unread = [Positions() for _ in self.parts]
        for rank in range(self.world):
            begin, window = self.window(rank, done)
            for index, part in enumerate(self.parts):
                left = sorted(place.position for batch in window[done - begin :] for place in batch[index])
                unread[index] += [range(position, position + 1) for position in left]
                unread[index] += self._cut(index, rank, (begin + len(window) - self.first) * part.rows, part.per_rank)
        return [joined(left + after) for left, after in zip(unread, self.after(), strict=True)]

    def after(self) -> list[Positions]:
        """For each part, what the batches of no rank read."""
        return [cut(unread, part.per_rank * self.world) for part, unread in zip(self.parts, self.unread, strict=True)]

    def _places(self, index: int, rank: int, first: int, last: int) -> list[Place]:
        """What batches `first` to `last` (exclusive) read of a part, before sorting."""
        part = self.parts[index]
        ranges = self._cut(index, rank, (first - self.first) * part.rows, (last - self.first) * part.rows)
        return [place for some in ranges for place in part.stream.places(some.start, some.stop)]

    def _cut(self, index: int, rank: int, low: int, high: int) -> Positions:
        """The positions `low` to `high` of those of a rank."""
        per_rank = self.parts[index].per_rank
        return cut(self.unread[index], rank * per_rank + low, rank * per_rank + min(high, per_rank))

    def _by_length(self, places: Sequence[Place]) -> list[int] | None:
        """Numbers of the places, sorted by length. None: the lengths are equal, or not all known."""
        lengths = [self.length(place.shard, place.index) for place in places] if self.length else []
        known = [length for length in lengths if length is not None]
        if len(known) < len(places) or len(set(known)) < 2:
            return None
        return sorted(range(len(places)), key=known.__getitem__)


def cut(positions: Sequence[range], low: int, high: int = sys.maxsize) -> Positions:
    """The `low`-th to `high`-th (exclusive) of some positions."""
    pieces, begin = [], 0
    for some in positions:
        pieces.append(some[max(0, low - begin) : max(0, high - begin)])
        begin += len(some)
    return [piece for piece in pieces if piece]


def joined(positions: Sequence[range]) -> Positions:
    """The same positions, adjacent ranges as one."""
    whole = Positions()
    for some in positions:
        start = whole.pop().start if whole and whole[-1].stop == some.start else some.start
        whole.append(range(start, some.stop))
    return whole


class Collate(Protocol):
    def __call__(self, samples: list[Sample]) -> tuple[Batch, Notes]: ...

    def misfit(self, sample: Sample) -> str | None: ...


@dataclass(eq=False)
class Loader:
    """Batches of one epoch; each pass over the loader calls `epoch()` for its number.

    batches: in an epoch on each rank; of one that is resumed with other ranks only if `fixed`
    notes:   counts of damaged samples and cut responses, shared by loaders
    bucket, length: see `Deal`

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
    _at: tuple[Deal, int] | None = field(default=None, init=False)  # and the number of batches yielded
    _resume: dict | None = field(default=None, init=False)

    def __len__(self) -> int:
        epoch = self.epoch()
        deal = self._at[0] if self._at and self._at[0].epoch == epoch else self._begin(epoch)[0]
        return deal.stop

    def __iter__(self) -> Iterator[Batch]:
        """A generator, so the resume point is not consumed before the first batch is requested."""
        deal, done = self._at = self._begin(self.epoch())
        self._resume = None
        loader = DataLoader(
            _Source(deal, self.rank, done, self.collate),
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
            self._at = (deal, done)
            if batch is not None:
                yield batch
            elif self.world > 1:  # the other ranks would wait forever
                damaged = ", ".join(sorted({where for where, reason in self.notes if reason != "cut"}))
                raise UserError(f"no sample of a batch could be read ({damaged}); copy or make the data again")

    def numbered(self, first: int) -> Iterator[tuple[int, Batch]]:
        """(number, batch), counted from `first`. A batch with damaged samples only is skipped, but keeps its number."""
        for batch in self:
            assert self._at is not None
            yield first + self._at[1] - 1, batch

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
        if self._at is None and self._resume:
            return self._resume
        deal, done = self._at or self._begin(self.epoch())
        return {
            "epoch": deal.epoch,
            "batches": done,
            "of": deal.stop,
            "world": deal.world,
            "first": deal.first,
            "unread": [[[some.start, some.stop] for some in positions] for positions in deal.unread],
            "counts": [part.stream.count for part in deal.parts],
            "plan": self.plan,
        }

    def load_state_dict(self, state: dict) -> None:
        self._resume, self._at = dict(state), None

    def _begin(self, epoch: int) -> tuple[Deal, int]:
        """What an epoch reads, and the number of its batches that the checkpoint has seen."""
        # 1. Where the run never had other ranks.
        nums = [part.per_rank * self.world for part in self.parts]
        starts = [part.start + epoch * num for part, num in zip(self.parts, nums, strict=True)]
        unread = [[range(start, sys.maxsize)] for start in starts]
        fresh = Deal(self.parts, unread, self.world, 0, epoch, self.bucket, self.length)
        last, done = self._at[0] if self._at else fresh, 0
        if saved := self._resume:
            changed = [
                f"{name} {saved['plan'].get(name)} -> {now}"
                for name, now in self.plan.items()
                if saved["plan"].get(name) != now
            ]
            is_begun = saved["epoch"] == epoch and saved["batches"]
            if changed and is_begun and saved["batches"] < saved["of"]:
                raise UserError(
                    f"the checkpoint is from the middle of epoch {epoch}, with other settings or data than now "
                    f"({'; '.join(changed)}): resume with those of before, or begin another run"
                )
            if changed:  # by a round that was added behind an epoch
                return fresh, fresh.stop if is_begun else 0
            last, done = self._restored(saved), saved["batches"]
        # 2. The epoch of the checkpoint. Other ranks deal out what is left of it, and what follows if they need more.
        if last.epoch == epoch and done:
            if last.world == self.world or done >= last.stop:
                return last, done
            steps = self.batches - done if self.fixed else -(-(last.stop - done) * last.world // self.world)
            parts = [replace(part, per_rank=steps * part.rows) for part in last.parts]
            return replace(last, parts=parts, unread=last.unread_at(done), world=self.world, first=done), done
        # 3. A later epoch begins where the last one has ended, or with the next pass if it is a pass.
        if last.epoch > epoch:
            return fresh, 0
        skipped = max(0, epoch - last.epoch - 1)
        for index, unread in enumerate(last.unread if last.epoch == epoch else last.after()):
            before, count, num = last.parts[index].stream.count, self.parts[index].stream.count, nums[index]
            if count != before or (count == num and not self.fixed):
                unread = [range(-(-unread[-1].start // before) * count, sys.maxsize)]
            fresh.unread[index] = cut(unread, skipped * num)
        return fresh, 0

    def _restored(self, saved: dict) -> Deal:
        num = saved["of"] - saved["first"]
        parts = [
            replace(part, stream=part.stream.resized(count), per_rank=num * part.rows)
            for part, count in zip(self.parts, saved["counts"], strict=True)
        ]
        unread = [[range(*some) for some in positions] for positions in saved["unread"]]
        return Deal(parts, unread, saved["world"], saved["first"], saved["epoch"], self.bucket, self.length)


class _Source(IterableDataset):
    """The batches of one worker, from the first one not yet consumed."""

    def __init__(self, deal: Deal, rank: int, done: int, collate: Collate) -> None:
        self.deal, self.rank, self.done, self.collate = deal, rank, done, collate

    def __iter__(self) -> Iterator[tuple[Batch | None, list[tuple[str, str, int]]]]:
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        readers = [Reader(p.stream, stand_in=p.stand_in, misfit=self.collate.misfit) for p in self.deal.parts]
        begin, window = 0, []
        for batch_number in range(self.done + number, self.deal.stop, workers):
            if not begin <= batch_number < begin + len(window):
                begin, window = self.deal.window(self.rank, batch_number)
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
