"""Assign items to splits by a hash of their names, so that splits do not depend on the order of records."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


@dataclass(kw_only=True)
class Item:
    """What becomes a sample: a photo with its captions, a scene, a text.

    key:    of the sample, unique
    name:   decides the split; items of one name, such as one image with two prompts, share it
    source: where the item comes from, for messages
    share:  hash of `name` in 0..1; None if the split is given
    """

    key: str
    name: str
    source: str
    split: str
    share: float | None = None


def hashed_share(name: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def split_of(share: float) -> str:
    """90 % train, 5 % val, 5 % test."""
    return "train" if share < 0.90 else "val" if share < 0.95 else "test"


def fill_splits(items: Sequence[Any], usable: Callable[[Any], bool]) -> None:
    """Move an item into each split without a usable one, from the largest split, in the order of hashes.

    Train comes first; val and test take an item only if its split keeps another usable one. An item whose split is
    given stays.
    """
    by_key = {item.key: item for item in items}
    is_usable = cache(lambda key: usable(by_key[key]))
    for split in SPLITS:
        if any(is_usable(item.key) for item in items if item.split == split):
            continue
        sizes = Counter({item.name: item.split for item in items}.values())
        movable = [item for item in items if item.share is not None]
        sign = 1 if split == "train" else -1
        for item in sorted(movable, key=lambda item: (-sizes[item.split], sign * (item.share or 0))):
            others = (o.key for o in items if o.split == item.split and o.name != item.name)
            if is_usable(item.key) and (split == "train" or any(map(is_usable, others))):
                for moved in items:
                    if moved.name == item.name:
                        moved.split = split
                break
