"""Read shards in an order that is a pure function of (seed, position), so that a run can resume anywhere.

    read_index(folder) -> Index                  what a data folder holds; an error where something is missing
    Stream(indexes, seed=0).segments(100, 164)   positions of an endless stream of passes -> places in shards
    Reader(stream).samples(100, 164)             the samples there, one for every position

    pass 0: shards permuted, samples permuted within each shard | pass 1: permuted anew | ...
            [---- epoch 0, cut into equal ranges per rank and worker ----][---- epoch 1 ...

Damaged samples (truncated tar, broken JSON or image) are counted. In training they do not change how many
samples a range yields: the next readable one of the shard stands in. Where each sample must come at most
once, in evaluation and for drafts, they are left out. `src.io.shards` is the writing side.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from PIL import Image

from src.io.errors import UserError
from src.io.files import sha256
from src.io.shards import INDEX, read_manifest, read_tar

IMAGES = ("png", "jpg")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """One tar and how many of its samples are in use. `image`: they have one; one that lacks it is damaged."""

    path: Path
    count: int
    image: bool = True


@dataclass(frozen=True)
class Index:
    """A data folder as its index.json describes it. `digest` is the hash of index.json itself."""

    path: Path
    kind: str
    tokenizer: str | None
    shards: tuple[Shard, ...]
    digest: str
    content: dict

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)

    def first(self, limit: int | None) -> Index:
        """The same folder, cut to its first `limit` samples."""
        if limit is None:
            return self
        left, kept = limit, []
        for shard in self.shards:
            kept.append(replace(shard, count=min(shard.count, left)))
            left -= kept[-1].count
        return Index(self.path, self.kind, self.tokenizer, tuple(s for s in kept if s.count), self.digest, self.content)


@dataclass
class Sample:
    """A sample as read: its key, the JSON, the encoded image and the same decoded to RGB; b"" and None without one."""

    key: str
    record: dict
    data: bytes
    image: Image.Image | None


def read_index(folder: str | Path, *, image: bool = True) -> Index:
    """What a data folder holds. Every shard must exist. `image`: a sample without one counts as damaged.

    Shards of another size than the index says are told; one of the same size that was replaced is not noticed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no data folder {folder}; make it with `python -m src.prepare`")
    content = read_manifest(folder)
    shards = tuple(Shard(folder / entry["name"], entry["count"], image) for entry in content["shards"])
    if missing := [shard.path.name for shard in shards if not shard.path.is_file()]:
        raise UserError(f"{folder} lacks {len(missing)} of {len(shards)} shards, such as {missing[0]}; make them again")
    sizes = [entry.get("bytes") for entry in content["shards"]]  # their hashes would take too long to compare
    changed = [s.path.name for s, size in zip(shards, sizes, strict=True) if size not in (None, s.path.stat().st_size)]
    if changed:
        log.warning(
            "%s: %d of %d shards, such as %s, are not of the size that %s says: they were cut or replaced since",
            folder, len(changed), len(shards), changed[0], INDEX,
        )  # fmt: skip
    return Index(folder, content["kind"], content["tokenizer"], shards, sha256(folder / INDEX), content)


class Segment(NamedTuple):
    """Some samples of one shard, by their place in it."""

    shard: Shard
    places: list[int]


class Stream:
    """An endless sequence of the samples of some data folders: pass after pass, each in an order of its own.

    shuffle: false keeps the order of the shards, for evaluation.
    """

    def __init__(self, indexes: Sequence[Index], *, seed: int, shuffle: bool = True) -> None:
        self.shards = tuple(shard for index in indexes for shard in index.shards)
        self.count = sum(shard.count for shard in self.shards)
        self.seed, self.shuffle = seed, shuffle
        self.digests = tuple(index.digest for index in indexes)
        if not self.count:
            raise ValueError("a stream needs at least one sample, but its data folders are empty")

    def segments(self, start: int, stop: int) -> Iterator[Segment]:
        """The places of positions `start` to `stop` (exclusive) of the stream, in order."""
        while start < stop:
            turn, offset = divmod(start, self.count)
            end = min(self.count, offset + stop - start)
            yield from self._in_pass(turn, offset, end)
            start += end - offset

    def _in_pass(self, turn: int, start: int, stop: int) -> Iterator[Segment]:
        begin = 0
        for number in self._order(len(self.shards), f"{turn}"):
            shard = self.shards[number]
            low, high = max(start - begin, 0), min(stop - begin, shard.count)
            if low < high:
                yield Segment(shard, self._order(shard.count, f"{turn}/{number}")[low:high])
            begin += shard.count

    def _order(self, count: int, name: str) -> list[int]:
        order = list(range(count))
        if self.shuffle:
            Random(f"{self.seed}/{name}").shuffle(order)
        return order


class Reader:
    """Reads a stream and remembers what was damaged: `damage` counts samples by (shard, reason).

    stand_in: a readable sample takes the place of a damaged one, which is left out otherwise
    misfit: why a sample that can be read cannot be used; it counts as damaged then
    """

    def __init__(
        self, stream: Stream, *, stand_in: bool = True, misfit: Callable[[Sample], str | None] = lambda _: None
    ) -> None:
        self.stream, self.stand_in, self.misfit = stream, stand_in, misfit
        self._shown: dict[Shard, str] = {}  # of each shard with misfits, the first
        self.damage: Counter[tuple[str, str]] = Counter()

    def samples(self, start: int, stop: int) -> Iterator[Sample]:
        """The samples at the positions `start` to `stop` (exclusive) of the stream, in order."""
        for shard, places in self.stream.segments(start, stop):
            wanted = set(places)
            found = {place: raw for place, raw in enumerate(read_tar(shard.path, strict=False)) if place in wanted}
            for place in places:
                sample = self._decode(shard, found.pop(place, None))
                if sample or self.stand_in:
                    yield sample or self._stand_in(shard, place)

    def _decode(self, shard: Shard, raw: dict[str, Any] | None) -> Sample | None:
        sample = None if raw is None else decode(raw, image=shard.image)
        if sample is None:
            self.damage[str(shard.path), "missing" if raw is None else "damaged"] += 1
        elif why := self.misfit(sample):
            self.damage[self._shown.setdefault(shard, f"{sample.key} of {shard.path}: {why}"), "misfit"] += 1
            return None
        return sample

    def _stand_in(self, shard: Shard, place: int) -> Sample:
        """The next readable sample behind a place, going round in its shard, then in the other shards.

        It depends on the files only, so a resumed run finds the same one.
        """
        for other in (shard, *(s for s in self.stream.shards if s != shard)):
            raws = list(islice(read_tar(other.path, strict=False), other.count))
            for step in range(len(raws)):
                sample = decode(raws[(place + step) % len(raws)], image=other.image)
                if sample and not self.misfit(sample):
                    return sample
        raise UserError(f"no readable sample in {shard.path} nor in any other shard of its stream; make the data again")


def decode(raw: dict[str, Any], *, image: bool = True) -> Sample | None:
    """JSON and image of a raw sample, or None where one of them is missing or damaged. `image`: there has to be one."""
    data = next((raw[name] for name in IMAGES if name in raw), None)
    if "json" not in raw or (image and data is None):
        return None
    try:
        record = json.loads(raw["json"])
        if not isinstance(record, dict):
            return None
        if data is None:
            return Sample(raw["__key__"], record, b"", None)
        with Image.open(io.BytesIO(data)) as picture:
            return Sample(raw["__key__"], record, data, picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError):  # what Pillow and json raise on damaged bytes
        return None
