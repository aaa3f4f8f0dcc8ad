"""Read shards in an order that is a pure function of (seed, position), so that a run can resume anywhere.

    Reader(Stream([read_index(folder)], seed=0)).samples(100, 164)      at positions 100 to 163 of the stream

    pass 0: shards permuted, samples permuted within each shard | pass 1: new permutation | ...
            [---- epoch 0, cut into equal ranges per rank and worker ----][---- epoch 1 ...

Damaged samples (truncated tar, broken JSON or image) are counted. In training the next readable sample of the shard
replaces each, so the number of samples stays the same. In drafts and in evaluation on one rank they are left out.
"""

from __future__ import annotations

import io
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from src.io.errors import UserError
from src.io.files import sha256
from src.io.shards import INDEX, Tar, read_manifest

IMAGES = ("png", "jpg")
OPEN_SHARDS = 16  # per reader; a shard takes a file handle and the places of its files, some 100 bytes each


@dataclass(frozen=True)
class Shard:
    """A tar file. count: samples in use; image: a sample without an image is damaged."""

    path: Path
    count: int
    image: bool = True


@dataclass(frozen=True)
class Index:
    """A data folder, as described by its index.json. digest: hash of index.json."""

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
        remaining, kept = self.count if limit is None else limit, []
        for shard in self.shards:
            kept.append(replace(shard, count=min(shard.count, remaining)))
            remaining -= kept[-1].count
        return replace(self, shards=tuple(shard for shard in kept if shard.count))


@dataclass
class Sample:
    """A decoded sample.

    record: its JSON; data, image: the encoded image and its RGB pixels, or b"" and None
    position: in the stream, over all passes; passes: how often the stream had been read before
    """

    key: str
    record: dict
    data: bytes
    image: Image.Image | None
    position: int = 0
    passes: int = 0


def read_index(folder: str | Path, *, image: bool = True) -> Index:
    """Read a data folder's index.json. image: a sample without an image counts as damaged.

    Raises UserError if a shard is missing. A shard that was replaced by another is not detected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no data folder {folder}; make it with `python -m src.prepare`")
    content = read_manifest(folder)
    shards = tuple(Shard(folder / entry["name"], entry["count"], image) for entry in content["shards"])
    if missing := [shard.path.name for shard in shards if not shard.path.is_file()]:
        raise UserError(f"{folder} lacks {len(missing)} of {len(shards)} shards, such as {missing[0]}; make them again")
    return Index(folder, content["kind"], content["tokenizer"], shards, sha256(folder / INDEX), content)


class Stream:
    """An endless sequence of passes over the samples of data folders, each pass in its own order.

    shuffle: False keeps the order of the shards, for evaluation
    first_pass: number of the first pass, which the noise of its samples depends on; their order does not
    """

    def __init__(self, indexes: Sequence[Index], *, seed: int, shuffle: bool = True, first_pass: int = 0) -> None:
        self.shards = tuple(shard for index in indexes for shard in index.shards)
        self.count = sum(shard.count for shard in self.shards)
        self.seed, self.shuffle, self.first_pass = seed, shuffle, first_pass
        self.digests = tuple(index.digest for index in indexes)
        if not self.count:
            raise UserError(f"{', '.join(str(index.path) for index in indexes)}: no samples")

    def segments(self, start: int, stop: int) -> Iterator[tuple[Shard, list[int]]]:
        """(shard, indices in it) of the samples at positions `start` to `stop` (exclusive)."""
        while start < stop:
            pass_number, offset = divmod(start, self.count)
            end = min(self.count, offset + stop - start)
            begin = 0  # of a shard within the pass
            for number in self._order(len(self.shards), f"{pass_number}"):
                shard = self.shards[number]
                low, high = max(offset - begin, 0), min(end - begin, shard.count)
                if low < high:
                    yield shard, self._order(shard.count, f"{pass_number}/{number}")[low:high]
                begin += shard.count
            start += end - offset

    def _order(self, count: int, name: str) -> list[int]:
        order = list(range(count))
        if self.shuffle:
            Random(f"{self.seed}/{name}").shuffle(order)
        return order


class Reader:
    """Reads samples of a stream; `damage` counts unusable ones by (place, reason).

    stand_in: replace a damaged sample by a readable one instead of leaving it out
    misfit: returns why a readable sample cannot be used, or None; such a sample counts as damaged

    A sample is read by seeking, so a reader holds one at a time and not a shard. A shard that cannot be opened is not
    asked again by the same reader.
    """

    def __init__(
        self, stream: Stream, *, stand_in: bool = True, misfit: Callable[[Sample], str | None] = lambda _: None
    ) -> None:
        self.stream, self.stand_in, self.misfit = stream, stand_in, misfit
        self._tars: OrderedDict[Path, Tar | None] = OrderedDict()  # the last used ones, and those that cannot be opened
        self._first_misfit: dict[Shard, str] = {}  # message for the first misfit of each shard
        self.damage: Counter[tuple[str, str]] = Counter()

    def samples(self, start: int, stop: int) -> Iterator[Sample]:
        for shard, indices in self.stream.segments(start, stop):
            for position, index in enumerate(indices, start):
                if sample := self.read(shard, index):
                    passes = self.stream.first_pass + position // self.stream.count
                    yield replace(sample, position=position, passes=passes)
            start += len(indices)

    def read(self, shard: Shard, index: int) -> Sample | None:
        """The sample at `index` of a shard. If it is unusable it is counted, and its stand-in returned, or None."""
        sample, place, reason = None, str(shard.path), ""
        try:
            if (tar := self._open(shard.path)) is None:
                reason = "unreadable"
            elif index >= len(tar):
                reason = "missing"
            elif (sample := decode(tar.read(index), image=shard.image)) is None:
                reason = "damaged"
            elif why := self.misfit(sample):
                place = self._first_misfit.setdefault(shard, f"{sample.key} of {place}: {why}")
                reason = "misfit"
        except OSError:
            reason = "unreadable"
        if not reason:
            return sample
        self.damage[place, reason] += 1
        return self._stand_in(shard, index) if self.stand_in else None

    def _stand_in(self, shard: Shard, index: int) -> Sample:
        """The next readable sample after `index`, cyclically in its shard, then in the other shards.

        It depends on the files only, so a resumed run gets the same one.
        """
        for other in (shard, *(s for s in self.stream.shards if s != shard)):
            tar = self._open(other.path)
            num = min(len(tar), other.count) if tar else 0
            for step in range(num):
                assert tar is not None
                try:
                    sample = decode(tar.read((index + step) % num), image=other.image)
                except OSError:
                    break  # of the whole file, as a rule
                if sample and not self.misfit(sample):
                    return sample
        raise UserError(f"no readable sample in {shard.path} nor in any other shard of its stream; make the data again")

    def _open(self, path: Path) -> Tar | None:
        """The tar, its headers read; None if that is impossible."""
        if path not in self._tars:
            try:
                self._tars[path] = Tar(path.open("rb"))
            except OSError:
                self._tars[path] = None
            opened = [key for key, tar in self._tars.items() if tar]
            for key in opened[:-OPEN_SHARDS]:
                del self._tars[key]
        self._tars.move_to_end(path)
        return self._tars[path]


def decode(raw: dict[str, Any], *, image: bool = True) -> Sample | None:
    """A raw sample; None if its JSON or image is missing or damaged. image: whether an image is required."""
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
            picture.load()  # `convert` would copy an RGB image
            return Sample(raw["__key__"], record, data, picture if picture.mode == "RGB" else picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError):  # what Pillow and json raise on damaged bytes
        return None
