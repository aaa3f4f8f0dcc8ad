"""Assign images and texts to splits by a hash of their names, so that splits do not depend on the order of records.

split_of(hashed_share(name, seed))      train, val or test
fill_splits(photos, usable)             gives every split a usable image, if there are enough
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, TypeVar

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


class Placed(Protocol):
    """What `fill_splits` needs of a photo or text; see `Photo`."""

    split: str

    @property
    def key(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def share(self) -> float | None: ...


P = TypeVar("P", bound=Placed)


def hashed_share(name: str, seed: int) -> float:
    """Hash of a name as a number in 0..1."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def split_of(share: float) -> str:
    """90 % train, 5 % val, 5 % test."""
    return "train" if share < 0.90 else "val" if share < 0.95 else "test"


def fill_splits(photos: Sequence[P], usable: Callable[[P], bool]) -> None:
    """Move an image into each split without a usable one. Train comes first; val and test take one only if its
    split keeps another usable one.

    Images are taken from the largest split, in the order of their hashes. An image whose record sets its split stays.
    """
    by_key = {photo.key: photo for photo in photos}
    is_usable = cache(lambda key: usable(by_key[key]))
    for split in ("train", "val", "test"):
        if any(is_usable(photo.key) for photo in photos if photo.split == split):
            continue
        sizes = Counter({photo.name: photo.split for photo in photos}.values())
        movable = [photo for photo in photos if photo.share is not None]
        sign = 1 if split == "train" else -1
        for photo in sorted(movable, key=lambda p: (-sizes[p.split], sign * (p.share or 0))):
            others = (p.key for p in photos if p.split == photo.split and p.name != photo.name)
            if is_usable(photo.key) and (split == "train" or any(map(is_usable, others))):
                for moved in photos:
                    if moved.name == photo.name:
                        moved.split = split
                break
