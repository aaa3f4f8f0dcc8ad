"""Which split an image or a text belongs to: a hash of its name decides, so that splits do not depend on the order.

split_of(hashed_share(name, seed))      train, val or test
fill_splits(photos, usable)             afterwards every split has a usable image, where there are enough
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, TypeVar

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


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
