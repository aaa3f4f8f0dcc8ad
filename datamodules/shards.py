"""Read shards in an order that is a pure function of (seed, position), so that a run can resume anywhere.

    read_index(folder) -> Index                  what a data folder holds; an error where something is missing
    Stream(indexes, seed=0).segments(100, 164)   positions of an endless stream of passes -> places in shards
    Reader(stream).samples(100, 164)             the samples there, exactly one for every position

    pass 0: shards permuted, samples permuted within each shard | pass 1: permuted anew | ...
            [---- epoch 0, cut into equal ranges per rank and worker ----][---- epoch 1 ...

A damaged sample (truncated tar, broken JSON or image) does not change how many samples a range yields: the
next readable one of its shard stands in, and the damage is counted. `src.shards` is the writing side.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from src.shards import FORMAT, INDEX, sha256

IMAGES = ("png", "jpg")


@dataclass(frozen=True)
class Shard:
    """One tar and how many of its samples are in use."""

    path: Path
    count: int


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
            kept.append(Shard(shard.path, min(shard.count, left)))
            left -= kept[-1].count
        return Index(
            self.path, self.kind, self.tokenizer, tuple(s for s in kept if s.count), self.digest, self.content
        )


@dataclass
class Sample:
    """A sample as read: its key, the JSON, the encoded image and the same decoded to RGB."""

    key: str
    record: dict
    data: bytes
    image: Image.Image


def read_index(folder: str | Path, *, verify: bool = False) -> Index:
    """What a data folder holds. Every shard must exist, and with `verify` have the sha256 of the index."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no data folder {folder}; make it with `python -m src.prepare`")
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} has no {INDEX}: it is no data folder, or writing it was interrupted; make it again"
        )
    raw = (folder / INDEX).read_bytes()
    content = _parse_index(raw, folder / INDEX)
    shards = tuple(Shard(folder / entry["name"], entry["count"]) for entry in content["shards"])
    if missing := [shard.path.name for shard in shards if not shard.path.is_file()]:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards, such as {missing[0]}; make them again"
        )
    if verify:
        for shard, entry in zip(shards, content["shards"], strict=True):
            if sha256(shard.path) != entry["sha256"]:
                raise ValueError(
                    f"{shard.path} is not what {INDEX} says (sha256 differs); make it again or copy it anew"
                )
    digest = hashlib.sha256(raw).hexdigest()
    return Index(folder, content["kind"], content["tokenizer"], shards, digest, content)


def _parse_index(raw: bytes, path: Path) -> dict:
    try:
        content = json.loads(raw)
        form = content["format"]
        complete = (
            isinstance(content["kind"], str)
            and "tokenizer" in content
            and isinstance(content["shards"], list)
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); make the folder again"
        ) from error
    if form != FORMAT or not complete:
        raise ValueError(
            f"{path} has format {form!r}, but this version reads format {FORMAT}; make the folder again"
        )
    return content


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
    """Reads a stream and remembers what was damaged: `damage` counts samples by (shard, reason)."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.damage: Counter[tuple[str, str]] = Counter()

    def samples(self, start: int, stop: int) -> Iterator[Sample]:
        """One sample for every position of the stream from `start` to `stop` (exclusive), in order."""
        for shard, places in self.stream.segments(start, stop):
            wanted = set(places)
            found = {place: raw for place, raw in enumerate(read_tar(shard.path)) if place in wanted}
            for place in places:
                yield self._decode(shard, found.pop(place, None)) or self._stand_in(shard, place)

    def _decode(self, shard: Shard, raw: dict[str, Any] | None) -> Sample | None:
        sample = None if raw is None else decode(raw)
        if sample is None:
            self.damage[str(shard.path), "missing" if raw is None else "damaged"] += 1
        return sample

    def _stand_in(self, shard: Shard, place: int) -> Sample:
        """The next readable sample behind a place, going round in its shard, then in the other shards.

        It depends on the files only, so a resumed run finds the same one.
        """
        for other in (shard, *(s for s in self.stream.shards if s != shard)):
            raws = list(islice(read_tar(other.path), other.count))
            for step in range(len(raws)):
                if sample := decode(raws[(place + step) % len(raws)]):
                    return sample
        raise ValueError(
            f"no readable sample in {shard.path} nor in any other shard of its stream; make the data again"
        )


def read_tar(path: Path) -> Iterator[dict[str, Any]]:
    """The raw samples of a tar, as far as it can be read."""
    skip = lambda error: True  # noqa: E731 - what cannot be read is missed, and counted, by the caller
    with path.open("rb") as stream:
        files = tar_file_expander([{"url": str(path), "stream": stream}], handler=skip)
        yield from group_by_keys(files, handler=skip)


def decode(raw: dict[str, Any]) -> Sample | None:
    """JSON and image of a raw sample, or None where one of them is missing or damaged."""
    data = next((raw[name] for name in IMAGES if name in raw), None)
    if data is None or "json" not in raw:
        return None
    try:
        record = json.loads(raw["json"])
        with Image.open(io.BytesIO(data)) as image:
            return Sample(raw["__key__"], record, data, image.convert("RGB"))
    except (OSError, ValueError, SyntaxError):  # what Pillow and json raise on damaged bytes
        return None
