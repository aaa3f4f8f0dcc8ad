"""The order of samples: a pure function of (seed, position), so that a run can resume anywhere.

Stream([read_index(folder)], seed=0).segments(100, 164)      shards and indices of positions 100 to 163

pass 0: shards permuted, samples permuted within each shard | pass 1: new permutation | ...
        [---- epoch 0, cut into equal ranges per rank and worker ----][---- epoch 1 ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from src.io.errors import UserError
from src.io.files import sha256
from src.io.shards import INDEX, read_manifest
from src.io.words import counted


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
        raise UserError(
            f"{folder} lacks {len(missing)} of {counted(len(shards), 'shard')}, such as {missing[0]}; make them again"
        )
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
