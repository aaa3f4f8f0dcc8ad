"""The order of samples: a pure function of (seed, position), so that a run can resume anywhere.

    Stream([read_index(folder)], seed=0).places(100, 164)      shard and index of positions 100 to 163

    pass 0: shards permuted, samples permuted within each shard | pass 1: new permutation | ...

A pass takes each source of the data as often as its weight says, exactly and evenly. Let a source have c samples, of
which a pass takes n. Pass p takes the i-th of them

    floor((i + p + 1) n / c) - floor((i + p) n / c)

times: n in all, spread evenly over the shards, and after any number of passes each sample was taken equally often, give
or take one. Weight 1/2 takes every second sample, and the others in the next pass; weight 2 takes each twice, in two
copies of its shard, permuted independently. The samples that do not fill a batch on every rank are left out in the same
way (`resized`): other ones in every pass.

Noise and captions belong to (key, number), and `Place.passes` is a number that a sample never gets again, whatever the
weights, the ranks and the rounds: with k = ceil(weight) copies at most, copy j of pass p has the number k p + j.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np

from src.io.errors import UserError
from src.io.files import parse_json, sha256
from src.io.remote import Cache, Remote, locate, redact
from src.io.shards import INDEX, check_manifest, read_manifest
from src.io.words import counted

COLUMNS = {"prompt_tokens": np.int32, "sizes": np.int32, "source": np.uint8}  # of the index: a value for each sample


@dataclass(frozen=True)
class Shard:
    """A tar file. count: samples in use; image: a sample without an image is damaged.

    prompt_tokens (.), sizes (., 2), source (.): of each sample, the length of its prompt, the width and height of its
    image, and the number of its source; None if the index does not say
    """

    path: Path | Remote
    count: int
    image: bool = True
    prompt_tokens: np.ndarray | None = field(default=None, compare=False, repr=False)
    sizes: np.ndarray | None = field(default=None, compare=False, repr=False)
    source: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def sources(self) -> np.ndarray:
        """(count,) the number of the source of each sample in use."""
        return np.zeros(self.count, np.uint8) if self.source is None else self.source[: self.count]


@dataclass(frozen=True)
class Index:
    """A data folder, as described by its index.json.

    path: a str for a URL; digest: hash of index.json; content: all of it but the shards
    """

    path: Path | str
    kind: str
    tokenizer: str | None
    shards: tuple[Shard, ...]
    digest: str
    content: dict

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def weights(self) -> dict[str, float]:
        """Of each source, as prepared."""
        return {source["name"]: source.get("weight", 1) for source in self.content.get("sources", [{"name": ""}])}

    def first(self, limit: int | None) -> Index:
        """The same folder, cut to its first `limit` samples."""
        remaining, kept = self.count if limit is None else limit, []
        for shard in self.shards:
            kept.append(replace(shard, count=min(shard.count, remaining)))
            remaining -= kept[-1].count
        return replace(self, shards=tuple(shard for shard in kept if shard.count))


@dataclass(frozen=True, slots=True)
class Place:
    """Where the sample at a position of a stream is.

    passes: number of the pass and copy, another each time that the sample is taken
    turn:   position at which it is read, after sorting by length
    """

    position: int
    shard: Shard
    index: int
    passes: int
    turn: int


def read_index(folder: str | Path, *, image: bool = True, cache: Cache | None = None) -> Index:
    """Read a data folder's index.json. image: a sample without an image counts as damaged.

    folder: a path, a URL or `pipe:COMMAND` (src/io/remote.py); cache: where the shards of a URL are kept

    Raises UserError if a shard is missing, or a URL cannot be read. A shard of a local folder that was replaced by
    another is not detected.
    """
    file = locate(folder, INDEX, cache=cache)
    if isinstance(file, Path):
        if not file.parent.is_dir():
            raise UserError(f"no data folder {folder}; make it with `python -m src.prepare`")
        content, digest = read_manifest(folder), sha256(file)
    else:
        data = file.read_bytes()
        content, digest = check_manifest(parse_json(data, str(file)), file), hashlib.sha256(data).hexdigest()
    entries, shards = content.pop("shards"), []
    for entry in entries:
        path = locate(folder, entry["name"], cache=cache, size=entry.get("bytes"), sha256=entry.get("sha256"))
        columns = {name: np.array(entry[name], dtype=kind) for name, kind in COLUMNS.items() if name in entry}
        shards.append(Shard(path, entry["count"], image, **columns))
    if missing := [shard.path.name for shard in shards if isinstance(shard.path, Path) and not shard.path.is_file()]:
        raise UserError(
            f"{folder} lacks {len(missing)} of {counted(len(shards), 'shard')}, such as {missing[0]}; make them again"
        )
    if shards and isinstance(first := shards[0].path, Remote):
        first.probe(largest=max(entry.get("bytes", 0) for entry in entries))
    path = Path(folder) if isinstance(file, Path) else redact(folder)
    return Index(path, content["kind"], content["tokenizer"], tuple(shards), digest, content)


class Stream:
    """An endless sequence of passes over the samples of data folders, each pass in its own order.

    shuffle:    False keeps the order of the shards, for evaluation
    first_pass: number of the first pass, which the noise of its samples depends on; their order does not
    weights:    how often a pass takes the samples of each source, by name, where it differs from the index.
                None: every sample once, whatever the index says
    count:      samples in a pass; sizes, self.weights: samples and weights of each source
    summary:    the samples of a pass in words, before any is left out
    """

    def __init__(
        self,
        indexes: Sequence[Index],
        *,
        seed: int,
        shuffle: bool = True,
        first_pass: int = 0,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.shards = tuple(shard for index in indexes for shard in index.shards)
        self.seed, self.shuffle, self.first_pass = seed, shuffle, first_pass
        self.digests = tuple(index.digest for index in indexes)
        # 1. samples of each group (a source of a folder) in each shard
        shares, first, sizes = list[float](), list[int](), list[np.ndarray]()
        for index in indexes:
            prepared = index.weights
            for name in set(weights or {}) - set(prepared):
                close = difflib.get_close_matches(name, prepared, 1, 0)[0]
                hint = f"did you mean {close!r}?" if close else "its one source has no name"
                raise UserError(f"data.weights: {index.path} has no source {name!r}; {hint}")
            if wrong := [weight for weight in {**prepared, **(weights or {})}.values() if not 0 <= weight < math.inf]:
                raise UserError(f"data.weights must be finite and at least 0, got {wrong[0]}")
            first += [len(shares)] * len(index.shards)
            shares += [1.0] * len(prepared) if weights is None else [{**prepared, **weights}[n] for n in prepared]
        for shard, group in zip(self.shards, first, strict=True):
            sizes.append(np.bincount(group + shard.sources.astype(int), minlength=len(shares)))
        self._group = first  # number of the first group of each shard
        self._sizes = np.array(sizes, dtype=np.int64).reshape(len(self.shards), len(shares))
        self._begin = self._sizes.cumsum(0) - self._sizes  # samples of each group in the shards before
        # 2. samples of each group in a pass
        self._have = self._sizes.sum(0)
        self.sizes, self.weights = self._have.tolist(), shares
        self._take = self._whole = np.ceil(self._have * np.array(shares) - 1e-9).astype(np.int64)
        self._copies = np.maximum(1, -(-self._whole // np.maximum(1, self._have)))  # of a sample in a pass, at most
        self.count = int(self._take.sum())
        self._last: tuple[int, list[int], np.ndarray] | None = None
        self._last_unit: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None
        names = [name for index in indexes for name in index.weights]
        parts = [f"{size} of {name} x {share:g}" for name, size, share in zip(names, self.sizes, shares, strict=True)]
        self.summary = counted(self.count, "sample")
        if any(share != 1 for share in shares):
            self.summary += f" ({', '.join(parts)})"
        if not self.count:
            paths = ", ".join(str(index.path) for index in indexes)
            raise UserError(f"{paths}: no samples" + (f" with weights {dict(weights)}" if weights else ""))

    def resized(self, count: int) -> Stream:
        """The same stream with passes of `count` samples, the groups in proportion."""
        other = copy(self)
        ends = np.rint(self._whole.cumsum() * (count / self._whole.sum())).astype(np.int64)
        other._take, other.count = np.diff(ends, prepend=0), count
        other._last = other._last_unit = None
        return other

    def places(self, start: int, stop: int) -> Iterator[Place]:
        """The samples at positions `start` to `stop` (exclusive)."""
        while start < stop:
            number, offset = divmod(start, self.count)
            order, begins = self._pass(number)
            which = int(np.searchsorted(begins, offset, side="right")) - 1
            shard, indices, passes = self._unit(number, order[which])
            low = offset - int(begins[which])
            high = min(low + stop - start, len(indices))
            for index, passed in zip(indices[low:high].tolist(), passes[low:high].tolist(), strict=True):
                yield Place(start, shard, index, passed, turn=start)
                start += 1

    def _pass(self, number: int) -> tuple[list[int], np.ndarray]:
        """Units of a pass in order, and the offset at which each begins. Unit c * shards + s: copy c of shard s."""
        if self._last is None or self._last[0] != number:
            have, begin = np.maximum(self._have, 1), self._begin + number
            taken = (begin + self._sizes) * self._take // have - begin * self._take // have  # (shards, groups)
            whole = self._take // have  # copies of every sample; one more copy of some of them
            sizes = [
                np.where(whole > n, self._sizes, np.where(whole == n, taken - whole * self._sizes, 0)).sum(1)
                for n in range(max(1, int((-(-self._take // have)).max())))
            ]
            units = np.concatenate(sizes)
            order = self._order(len(units), f"{number}")
            units = units[order]
            self._last = number, order, units.cumsum() - units
        return self._last[1:]

    def _unit(self, number: int, unit: int) -> tuple[Shard, np.ndarray, np.ndarray]:
        """A shard, the indices of what pass `number` takes of this copy of it, in order, and their `Place.passes`."""
        copy_number, place = divmod(unit, len(self.shards))
        shard = self.shards[place]
        if self._last_unit is None or self._last_unit[0] != (number, unit):
            taken = np.zeros(shard.count, bool)
            for group in np.flatnonzero(self._sizes[place]):
                (indices,) = np.nonzero(shard.sources == group - self._group[place])
                have, take = self._have[group], self._take[group]
                i = self._begin[place, group] + np.arange(len(indices))
                taken[indices] = (i + number + 1) * take // have - (i + number) * take // have > copy_number
            (indices,) = np.nonzero(taken)
            passes = (self.first_pass + number) * self._copies[self._group[place] + shard.sources] + copy_number
            name = f"{number}/{place}" + (f"/{copy_number}" if copy_number else "")
            indices = indices[self._order(len(indices), name)]
            self._last_unit = (number, unit), indices, passes[indices]
        return shard, *self._last_unit[1:]

    def _order(self, count: int, name: str) -> list[int]:
        order = list(range(count))
        if self.shuffle:
            Random(f"{self.seed}/{name}").shuffle(order)
        return order
