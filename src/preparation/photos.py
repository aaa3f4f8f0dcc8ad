"""Photographs with annotation files: locate images, merge the records of an image, assign splits (`conf=photos`).

    Album("images/").add(entry) ... -> .photos() -> fill_splits(photos, usable)

A photo is one image under one prompt, with the captions of all its records. All photos of an image are in the same
split, even if the image has two names (`COCO_val2014_000000000042.jpg` is `000000000042.jpg`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from src.io.errors import UserError
from src.io.images import ENCODINGS, ImageProblem, convert, load
from src.preparation.annotations import Caption, Entry, Skip, read_entries
from src.preparation.builder import SPLITS, Dataset, check_splits, write_split
from src.preparation.counts import Counts
from src.preparation.scenes import CHAT_WORDS, make_codec
from src.preparation.splits import SPLIT_NAMES, fill_splits, hashed_share, split_of
from src.preparation.swaps import SwapLocator
from src.scenes.grammar import Swap
from src.text.tokenizer import Codec

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_COCO_PREFIX = re.compile(r"^COCO_(train|val|test)\d{4}_")
_ID_DIGITS = 12  # COCO file names pad ids with zeros


@dataclass
class Photo:
    """A future sample: image path, prompt, captions by text, and split.

    name:  of the image, without COCO's prefix
    share: hash of `name` in 0..1; None if a record sets the split
    """

    key: str
    path: Path
    prompt: str
    split: str
    name: str
    share: float | None
    captions: dict[str, Caption] = field(default_factory=dict)


class Album:
    """Collects entries whose images are under `folder`. Entries left out are counted in `counts`, by reason."""

    def __init__(self, folder: Path, *, prompt: str, seed: int, counts: Counts) -> None:
        if not folder.is_dir():
            raise UserError(f"no image folder {folder}")
        self.folder, self.prompt, self.seed, self.counts = folder, prompt, seed, counts
        self._photos: dict[tuple[Path, str], Photo] = {}
        self._splits: dict[str, tuple[str, float | None]] = {}

    def photos(self) -> list[Photo]:
        return list(self._photos.values())

    def add(self, entry: Entry) -> None:
        """Add the captions of an entry to the photo of its image and prompt."""
        try:
            path = self._find(entry.image)
        except Skip as reason:
            self.counts.note(str(reason), entry.image)
            return
        prompt = entry.prompt or self.prompt
        photo = self._photos.get((path, prompt))
        if photo is None:
            name = _COCO_PREFIX.sub("", path.stem)
            split, share = self._split(name, entry.split)
            photo = self._photos[path, prompt] = Photo(self._key(path, prompt), path, prompt, split, name, share)
        else:
            self.counts["merged"] += 1
        self._merge(photo, entry)

    def _merge(self, photo: Photo, entry: Entry) -> None:
        for caption in entry.captions:
            existing = photo.captions.setdefault(caption.text, caption)
            if existing is not caption:
                new = [swap for swap in caption.swaps if swap not in existing.swaps]
                existing.swaps.extend(new)
                self.counts["duplicate_caption"] += not new

    def _find(self, name: str) -> Path:
        """The image file of a name, trying it with fewer and fewer leading folders and in COCO's other spelling."""
        parts = [p for p in PurePosixPath(name.replace("\\", "/")).parts if p not in ("/", ".", "..")]
        for first in range(len(parts)):
            for candidate in _spellings(self.folder.joinpath(*parts[first:])):
                if os.path.isfile(candidate):  # unlike Path.is_file, False for invalid names
                    return candidate
        raise Skip("missing_image")

    def _key(self, path: Path, prompt: str) -> str:
        name = path.relative_to(self.folder).as_posix()
        digest = hashlib.blake2b(f"{name}\n{prompt}".encode(), digest_size=4).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', path.stem)[:60]}-{digest}"

    def _split(self, name: str, record_split: str | None) -> tuple[str, float | None]:
        """(split, share): from the image's first record if it sets a split (share None), else by a hash of the name."""
        if record_split and record_split.lower() not in SPLIT_NAMES:
            self.counts.note("unknown_split", name)
        split = SPLIT_NAMES.get(record_split.lower()) if record_split else None
        share = hashed_share(name, self.seed)
        return self._splits.setdefault(name, (split, None) if split else (split_of(share), share))


def _spellings(path: Path) -> list[Path]:
    """The path itself, without COCO's prefix and padding differences, and with each image suffix if it has none."""
    plain = path.with_name(_COCO_PREFIX.sub("", path.name))
    if path.name.isdecimal():
        plain = plain.with_name(plain.name.zfill(_ID_DIGITS))
    if path.suffix.lower() in SUFFIXES:
        return [path, plain]
    return [path, plain, *(p.with_name(p.name + suffix) for p in (path, plain) for suffix in SUFFIXES)]


@dataclass(kw_only=True)
class Photos(Dataset):
    """Photographs with captions, from annotation files in any format that `src.preparation.annotations` reads.

    images:          folder that the image names in the annotations are relative to
    annotations:     one file or several: JSON, JSONL, CSV or TSV
    image_size:      pixels, side of the stored square image: the whole picture, padded with grey
    encoding:        jpg or png
    square:          false keeps the shape of images, the longer side at most `image_size`, for training with tiles
    tokenizer:       folder of a tokenizer; null trains a byte-level one on the captions
    response_length: captions of more than response_length - 1 tokens are left out; `data.response_length` of training
        should be at least as large
    prompt:          for records without a question
    max_images:      use only the first `max_images` photos; null uses all
    """

    image_size: int
    vocab_size: int
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
        return [self.images, *self._files]

    @property
    def _files(self) -> Sequence[str]:
        return [self.annotations] if isinstance(self.annotations, str) else self.annotations

    def write(self, folder: Path) -> dict:
        read_counts = Counts()
        photos = self._collect(read_counts)
        codec = make_codec(folder, self.tokenizer, self._texts(photos), vocab_size=self.vocab_size, alphabet="bytes")
        fill_splits(photos, lambda photo: self._is_usable(photo, codec))
        counts = {"records": {reason: number for reason, number in read_counts.items() if number}}
        examples = {"records": read_counts.examples}
        with tqdm(total=len(photos), desc="photos", unit="image", disable=None) as bar:
            for split in SPLITS:
                split_photos = [photo for photo in photos if photo.split == split]
                split_counts = Counts()
                samples = self._samples(split_photos, codec, split_counts, bar)
                counts[split] = write_split(folder, split, samples, codec, self.per_shard, split_counts)
                examples[split] = split_counts.examples
        remedy = ("take `split` out of the records", "set `split` in the records")
        check_splits(counts, examples, noun="image", remedy=remedy)
        return {"tokenizer": codec.fingerprint, "counts": counts, "examples": examples}

    def _collect(self, counts: Counts) -> list[Photo]:
        album = Album(Path(self.images), prompt=self.prompt, seed=self.seed, counts=counts)
        for file in self._files:
            for entry in read_entries(Path(file), counts):
                album.add(entry)
        return album.photos()[: self.max_images]

    def _texts(self, photos: list[Photo]) -> Iterator[str]:
        yield f"{self.prompt} {CHAT_WORDS}"
        for photo in photos:
            yield photo.prompt
            for caption in photo.captions.values():
                yield caption.text
                yield from (swap.wrong for swap in caption.swaps)

    def _is_usable(self, photo: Photo, codec: Codec) -> bool:
        """Whether the photo has a caption that fits and an image that can be decoded."""
        if all(self._is_long(text, codec) for text in photo.captions):
            return False
        try:
            load(photo.path, size=self.image_size)
        except ImageProblem:
            return False
        return True

    def _is_long(self, text: str, codec: Codec) -> bool:
        return len(codec.encode(text)[0]) >= self.response_length

    def _samples(self, photos: list[Photo], codec: Codec, counts: Counts, bar: tqdm) -> Iterator[dict]:
        locate = SwapLocator(codec)
        for photo in photos:
            bar.update()
            file = photo.path.relative_to(self.images).as_posix()
            captions = [self._caption(caption, file, locate, counts) for caption in photo.captions.values()]
            captions = [caption for caption in captions if caption]
            if not captions:
                counts.note("no_usable_caption", file)
                continue
            try:
                data = convert(photo.path, size=self.image_size, encoding=self.encoding, square=self.square)
            except ImageProblem as reason:
                counts.note(str(reason), file)
                continue
            record = {"key": photo.key, "prompt": photo.prompt, "captions": captions}
            yield {"__key__": photo.key, "json": record, self.encoding: data}

    def _caption(self, caption: Caption, file: str, locate: SwapLocator, counts: Counts) -> dict | None:
        if self._is_long(caption.text, locate.codec):
            counts.note("captions too long", file)
            return None
        swaps = [Swap(s.start, s.start + len(s.right), s.right, s.wrong, "phrase") for s in caption.swaps]
        return {"text": caption.text, "swaps": locate(caption.text, swaps, counts)}
