"""Read the samples of a stream (datamodules/stream.py) from their shards.

    stream = Stream([read_index(folder)], seed=0)
    Reader(stream).samples(stream.places(100, 164))      at positions 100 to 163

Damaged samples (truncated tar, broken JSON or image) are counted. In training the next readable sample of their source
replaces each, so the number of samples and the weights stay the same. In drafts and in evaluation on one rank they are
left out.
"""

from __future__ import annotations

import io
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.stream import Place, Shard, Stream
from src.io.errors import UserError
from src.io.remote import Remote
from src.io.shards import Tar

IMAGES = ("png", "jpg")
OPEN_SHARDS = 16  # per reader; a shard takes a file handle and the places of its files, some 100 bytes each


@dataclass
class Sample:
    """A decoded sample.

    record: its JSON; data, image: the encoded image and its RGB pixels, or b"" and None
    position: in the stream, over all passes
    passes:   number of the pass, which its noise and caption belong to (`Place.passes`); below 0 for a stand-in
    """

    key: str
    record: dict
    data: bytes
    image: Image.Image | None
    position: int = 0
    passes: int = 0


class Reader:
    """Reads samples of a stream; `damage` counts unusable ones by (place, reason).

    stand_in: replace a damaged sample by a readable one instead of leaving it out
    misfit: returns why a readable sample cannot be used, or None; such a sample counts as damaged

    A sample is read by seeking, so a reader holds one at a time and not a shard. A shard that cannot be opened is not
    asked again by the same reader, which lasts an epoch.
    """

    def __init__(
        self, stream: Stream, *, stand_in: bool = True, misfit: Callable[[Sample], str | None] = lambda _: None
    ) -> None:
        self.stream, self.stand_in, self.misfit = stream, stand_in, misfit
        self._tars: OrderedDict[Path | Remote, Tar | None] = OrderedDict()  # the last used; None: cannot be opened
        self._is_usable: dict[Shard, np.ndarray] = {}  # (count,) False where a sample was found to be unusable
        self._first_misfit: dict[Shard, str] = {}  # message for the first misfit of each shard
        self._begins = dict(zip(stream.shards, accumulate((s.count for s in stream.shards), initial=0), strict=False))
        self.damage: Counter[tuple[str, str]] = Counter()

    def samples(self, places: Iterable[Place]) -> Iterator[Sample]:
        for place in places:
            if sample := self.read(place.shard, place.index):
                yield replace(sample, position=place.turn, passes=place.passes)
            elif self.stand_in:
                yield replace(self._stand_in(place), position=place.turn)

    def read(self, shard: Shard, index: int) -> Sample | None:
        """The sample at `index` of a shard; None if it is unusable, which is counted."""
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
        except OSError:  # a bad sector, or a file that was removed: open it again
            reason = "unreadable"
            self._tars.pop(shard.path)
        if not reason:
            return sample
        self.damage[place, reason] += 1
        return None

    def _stand_in(self, place: Place) -> Sample:
        """The next readable sample of the same source, cyclically in the shard, then in the other shards.

        It depends on the files that can be read only: a resumed run gets the same one, unless a server or a disk
        answers again. Its `passes` is a number below 0, another for each pass and damaged sample, so it is never seen
        with the same noise again.
        """
        source, total = place.shard.sources[place.index], sum(shard.count for shard in self.stream.shards)
        for shard in (place.shard, *(shard for shard in self.stream.shards if shard != place.shard)):
            tar = self._open(shard.path)
            if not tar:
                continue
            num = min(len(tar), shard.count)
            is_usable = self._is_usable.setdefault(shard, np.ones(shard.count, bool))
            indices = np.flatnonzero(is_usable[:num] & (shard.sources[:num] == source))
            for index in np.roll(indices, -np.searchsorted(indices, place.index % num)).tolist():
                try:
                    sample = decode(tar.read(index), image=shard.image)
                except OSError:
                    break  # of the whole file, as a rule
                if sample and not self.misfit(sample):
                    damaged = self._begins[place.shard] + place.index  # its number in the stream
                    return replace(sample, passes=-1 - place.passes * total - damaged)
                is_usable[index] = False
        raise UserError(
            f"no readable sample in {place.shard.path}, nor of its source in any other shard; make the data again"
        )

    def _open(self, path: Path | Remote) -> Tar | None:
        """The tar, its headers read; None if that is impossible."""
        if path not in self._tars:
            try:
                self._tars[path] = Tar(path.open("rb"))
            except OSError:
                self._tars[path] = None
            opened = [key for key, tar in self._tars.items() if tar is not None]
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
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # of Pillow and json, on damaged bytes
        return None
