"""Entries of annotation files to photos: images found, records of one image merged, splits fixed.

    Album("images/").add(entry) ... -> .photos() -> fill_splits(photos, usable)

One photo is one image under one prompt, with all captions that any record gives for it. All photos of an
image are in one split, also where it has two names (`COCO_val2014_000000000042.jpg` is `000000000042.jpg`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from src.importers.counts import Counts
from src.importers.records import Caption, Entry, Skip

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
_COCO_PREFIX = re.compile(r"^COCO_(train|val|test)\d{4}_")
_ID_DIGITS = 12  # COCO pads ids so in file names


@dataclass
class Photo:
    """One sample to be: where its image is, its prompt, captions by text, and its split.

    name: of the image, without COCO's prefix; share: its hash in 0..1, None where a record decides the split instead
    """

    key: str
    path: Path
    prompt: str
    split: str
    name: str
    share: float | None
    captions: dict[str, Caption] = field(default_factory=dict)


class Placed(Protocol):
    """What `fill_splits` moves: see `Photo`."""

    split: str

    @property
    def key(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def share(self) -> float | None: ...


P = TypeVar("P", bound=Placed)


class Album:
    """Collects entries whose images lie under `folder`. `counts` gets what is left out, by reason."""

    def __init__(self, folder: Path, *, prompt: str, seed: int, counts: Counts) -> None:
        if not folder.is_dir():
            raise ValueError(f"no image folder {folder}")
        self.folder, self.prompt, self.seed, self.counts = folder, prompt, seed, counts
        self._photos: dict[tuple[Path, str], Photo] = {}
        self._splits: dict[str, tuple[str, float | None]] = {}

    def photos(self) -> list[Photo]:
        return list(self._photos.values())

    def add(self, entry: Entry) -> None:
        """File an entry under its image and prompt."""
        try:
            path = self._find(entry.image)
        except Skip as reason:
            self.counts.note(str(reason), entry.image)
            return
        prompt = entry.prompt or self.prompt
        photo = self._photos.get((path, prompt))
        if photo is None:
            name = _COCO_PREFIX.sub("", path.stem)
            place = self._split(name, entry.split)
            photo = self._photos[path, prompt] = Photo(self._key(path, prompt), path, prompt, place[0], name, place[1])
        else:
            self.counts["merged"] += 1
        self._merge(photo, entry)

    def _merge(self, photo: Photo, entry: Entry) -> None:
        for caption in entry.captions:
            known = photo.captions.setdefault(caption.text, caption)
            if known is not caption:
                new = [swap for swap in caption.swaps if swap not in known.swaps]
                known.swaps.extend(new)
                self.counts["duplicate_caption"] += not new

    def _find(self, name: str) -> Path:
        """The file that a name means: with all of its folders or fewer, or under COCO's other name."""
        parts = [p for p in PurePosixPath(name.replace("\\", "/")).parts if p not in ("/", ".", "..")]
        for first in range(len(parts)):
            for candidate in _names(self.folder.joinpath(*parts[first:])):
                if os.path.isfile(candidate):  # unlike Path.is_file, false for impossible names too
                    return candidate
        raise Skip("missing_image")

    def _key(self, path: Path, prompt: str) -> str:
        name = path.relative_to(self.folder).as_posix()
        digest = hashlib.blake2b(f"{name}\n{prompt}".encode(), digest_size=4).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', path.stem)[:60]}-{digest}"

    def _split(self, name: str, given: str | None) -> tuple[str, float | None]:
        """What the image's first record says, else by a hash of its name; the hash, if that decides."""
        if given and given.lower() not in SPLITS:
            self.counts.note("unknown_split", name)
        known = SPLITS.get(given.lower()) if given else None
        share = hashed_share(name, self.seed)
        return self._splits.setdefault(name, (known, None) if known else (split_of(share), share))


def hashed_share(name: str, seed: int) -> float:
    """A number in 0..1 as a function of a name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def split_of(share: float) -> str:
    """90 % train, 5 % val, 5 % test."""
    return "train" if share < 0.90 else "val" if share < 0.95 else "test"


def fill_splits(photos: Sequence[P], usable: Callable[[P], bool]) -> None:
    """Move an image into each split without a usable one: train first, then val and test while another one is left.

    It is taken from the largest split, by the order of the hashes. An image whose record names its split stays there.
    """
    by_key = {photo.key: photo for photo in photos}
    good = cache(lambda key: usable(by_key[key]))
    for split in ("train", "val", "test"):
        if any(good(photo.key) for photo in photos if photo.split == split):
            continue
        names = Counter({photo.name: photo.split for photo in photos}.values())
        free = [photo for photo in photos if photo.share is not None]
        sign = 1 if split == "train" else -1
        for photo in sorted(free, key=lambda p: (-names[p.split], sign * (p.share or 0))):
            others = (p.key for p in photos if p.split == photo.split and p.name != photo.name)
            if good(photo.key) and (split == "train" or any(map(good, others))):
                _move(photos, photo.name, split)
                break


def _move(photos: Sequence[Placed], name: str, split: str) -> None:
    for photo in photos:
        if photo.name == name:
            photo.split = split


def _names(path: Path) -> list[Path]:
    plain = path.with_name(_COCO_PREFIX.sub("", path.name))
    if path.name.isdecimal():
        plain = plain.with_name(plain.name.zfill(_ID_DIGITS))
    bare = [] if path.suffix.lower() in ENDINGS else [p.with_name(p.name + e) for p in (path, plain) for e in ENDINGS]
    return [path, plain, *bare]
