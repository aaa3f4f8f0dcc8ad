"""Photographs with annotation files (`conf=photos`).

A photo is one image under one prompt, with the captions of all its records. All photos of an image are in the same
split, even if the image has two names (`COCO_val2014_000000000042.jpg` is `000000000042.jpg`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import ClassVar

from src.io.errors import UserError
from src.io.images import ENCODINGS, ImageProblem, convert, load
from src.preparation.annotations import Caption, Entry, read_entries
from src.preparation.builder import Dataset
from src.preparation.counts import Counts
from src.preparation.splits import SPLIT_NAMES, Item, hashed_share, split_of
from src.preparation.swaps import SwapLocator
from src.text.tokenizer import Codec

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_COCO_PREFIX = re.compile(r"^COCO_(train|val|test)\d{4}_")
_ID_DIGITS = 12  # COCO file names pad ids with zeros


@dataclass(kw_only=True)
class Photo(Item):
    """An image under one prompt. name: of the image, without COCO's prefix; captions: by text."""

    path: Path
    prompt: str
    captions: dict[str, Caption] = field(default_factory=dict)


@dataclass(kw_only=True)
class Photos(Dataset):
    """Photographs with captions, from annotation files in any format that `src.preparation.annotations` reads.

    images:      folder that the image names in the annotations are relative to
    annotations: one file or several: JSON, JSONL, CSV or TSV
    image_size:  pixels, side of the stored square image: the whole picture, padded with grey
    encoding:    jpg or png
    square:      false keeps the shape of images, the longer side at most `image_size`, for training with tiles
    prompt:      for records without a question
    max_images:  use only the first `max_images` photos; null uses all
    """

    remedies: ClassVar[tuple[str, str]] = ("take `split` out of the records", "set `split` in the records")

    image_size: int
    prompt: str
    images: str
    annotations: str | Sequence[str]
    encoding: str = "jpg"
    square: bool = True
    max_images: int | None = None

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise UserError(f"encoding must be one of {', '.join(ENCODINGS)}, got {self.encoding!r}")
        if self.image_size < 1:
            raise UserError(f"image_size must be at least 1, got {self.image_size}")

    @property
    def sources(self) -> Sequence[str]:
        return [self.images, *([self.annotations] if isinstance(self.annotations, str) else self.annotations)]

    def read(self, counts: Counts) -> list[Photo]:
        """The photos of all records whose image is there. The first record of an image sets its split."""
        folder = Path(self.images)
        if not folder.is_dir():
            raise UserError(f"no image folder {folder}")
        photos: dict[tuple[Path, str], Photo] = {}
        splits: dict[str, tuple[str, float | None]] = {}
        for file in self.sources[1:]:
            for entry in read_entries(Path(file), counts):
                path = find_image(folder, entry.image)
                if path is None:
                    counts.skip("missing_image", entry.image)
                    continue
                place = path, entry.prompt or self.prompt
                if place in photos:
                    counts["merged"] += 1
                else:
                    photos[place] = self._photo(*place, entry.split, splits, counts)
                merge(photos[place], entry, counts)
        return list(photos.values())[: self.max_images]

    def _photo(
        self, path: Path, prompt: str, given: str | None, splits: dict[str, tuple[str, float | None]], counts: Counts
    ) -> Photo:
        name, source = _COCO_PREFIX.sub("", path.stem), path.relative_to(self.images).as_posix()
        if name not in splits:
            share, split = hashed_share(name, self.seed), SPLIT_NAMES.get((given or "").lower())
            splits[name] = (split, None) if split else (split_of(share), share)
        counts["unknown_split"] += bool(given) and given.lower() not in SPLIT_NAMES  # type: ignore[union-attr]
        split, share = splits[name]
        digest = hashlib.blake2b(f"{source}\n{prompt}".encode(), digest_size=4).hexdigest()
        key = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', path.stem)[:60]}-{digest}"
        return Photo(key=key, name=name, source=source, split=split, share=share, path=path, prompt=prompt)

    def texts(self, items: Sequence[Photo]) -> Iterator[str]:
        yield f"{self.prompt} system user assistant"  # the roles of the chat template
        for photo in items:
            yield photo.prompt
            for caption in photo.captions.values():
                yield caption.text
                yield from (swap.wrong for swap in caption.swaps)

    def is_usable(self, item: Photo, codec: Codec) -> bool:
        """Whether the photo has a caption that fits and an image that can be decoded."""
        if all(len(codec.encode(text)[0]) >= self.response_length for text in item.captions):
            return False
        try:
            load(item.path, size=self.image_size)
        except ImageProblem:
            return False
        return True

    def samples(self, items: Iterable[Photo], codec: Codec, counts: Counts) -> Iterator[dict]:
        locate = SwapLocator(codec)
        for photo in items:
            captions = []
            for caption in photo.captions.values():
                if len(locate.codec.encode(caption.text)[0]) < self.response_length:
                    captions.append({"text": caption.text, "swaps": locate(caption.text, caption.swaps, counts)})
                else:
                    counts.skip("captions too long", photo.source)
            if not captions:
                counts.skip("no_usable_caption", photo.source)
                continue
            try:
                data = convert(photo.path, size=self.image_size, encoding=self.encoding, square=self.square)
            except ImageProblem as reason:
                counts.skip(reason, photo.source)
                continue
            record = {"key": photo.key, "prompt": photo.prompt, "captions": captions}
            yield {"__key__": photo.key, "json": record, self.encoding: data}


def merge(photo: Photo, entry: Entry, counts: Counts) -> None:
    """Add the captions of a record to a photo; a caption that it has already may bring new swaps."""
    for caption in entry.captions:
        existing = photo.captions.setdefault(caption.text, caption)
        if existing is not caption:
            new = [swap for swap in caption.swaps if swap not in existing.swaps]
            existing.swaps.extend(new)
            counts["duplicate_caption"] += not new


def find_image(folder: Path, name: str) -> Path | None:
    """The image file of a name, trying it with fewer and fewer leading folders, in COCO's other spelling (without the
    prefix, with padding), and with each image suffix if it has none."""
    parts = [p for p in PurePosixPath(name.replace("\\", "/")).parts if p not in ("/", ".", "..")]
    for first in range(len(parts)):
        path = folder.joinpath(*parts[first:])
        plain = path.with_name(_COCO_PREFIX.sub("", path.name))
        if path.name.isdecimal():
            plain = plain.with_name(plain.name.zfill(_ID_DIGITS))
        spellings = [path, plain]
        if path.suffix.lower() not in SUFFIXES:
            spellings += [p.with_name(p.name + suffix) for p in (path, plain) for suffix in SUFFIXES]
        for candidate in spellings:
            if os.path.isfile(candidate):  # unlike Path.is_file, False for invalid names
                return candidate
    return None
