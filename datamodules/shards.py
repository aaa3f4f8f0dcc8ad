"""Read the samples of a stream (datamodules/stream.py) from their shards.

    Reader(Stream([read_index(folder)], seed=0)).samples(100, 164)      at positions 100 to 163 of the stream

Damaged samples (truncated tar, broken JSON or image) are counted. In training the next readable sample of the shard
replaces each, so the number of samples stays the same. In drafts and in evaluation on one rank they are left out.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from PIL import Image

from datamodules.stream import Shard, Stream
from src.io.errors import UserError
from src.io.shards import read_tar

IMAGES = ("png", "jpg")


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


class Reader:
    """Reads a stream; `damage` counts unusable samples by (place, reason).

    stand_in: replace a damaged sample by a readable one instead of leaving it out
    misfit: returns why a readable sample cannot be used, or None; such a sample counts as damaged
    """

    def __init__(
        self, stream: Stream, *, stand_in: bool = True, misfit: Callable[[Sample], str | None] = lambda _: None
    ) -> None:
        self.stream, self.stand_in, self.misfit = stream, stand_in, misfit
        self._first_misfit: dict[Shard, str] = {}  # message for the first misfit of each shard
        self.damage: Counter[tuple[str, str]] = Counter()

    def samples(self, start: int, stop: int) -> Iterator[Sample]:
        for shard, indices in self.stream.segments(start, stop):
            selected = set(indices)
            raws = {index: raw for index, raw in enumerate(read_tar(shard.path, strict=False)) if index in selected}
            for position, index in enumerate(indices, start):
                raw = raws.pop(index, None)
                sample = None if raw is None else decode(raw, image=shard.image)
                if sample is None:
                    self.damage[str(shard.path), "missing" if raw is None else "damaged"] += 1
                elif why := self.misfit(sample):
                    message = self._first_misfit.setdefault(shard, f"{sample.key} of {shard.path}: {why}")
                    self.damage[message, "misfit"] += 1
                    sample = None
                if sample or self.stand_in:
                    sample = sample or self._stand_in(shard, index)
                    yield replace(
                        sample, position=position, passes=self.stream.first_pass + position // self.stream.count
                    )
            start += len(indices)

    def _stand_in(self, shard: Shard, index: int) -> Sample:
        """The next readable sample after `index`, cyclically in its shard, then in the other shards.

        It depends on the files only, so a resumed run gets the same one.
        """
        for other in (shard, *(s for s in self.stream.shards if s != shard)):
            raws = list(islice(read_tar(other.path, strict=False), other.count))
            for step in range(len(raws)):
                sample = decode(raws[(index + step) % len(raws)], image=other.image)
                if sample and not self.misfit(sample):
                    return sample
        raise UserError(f"no readable sample in {shard.path} nor in any other shard of its stream; make the data again")


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
            return Sample(raw["__key__"], record, data, picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError):  # what Pillow and json raise on damaged bytes
        return None
