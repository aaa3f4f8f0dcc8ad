"""Assign items to splits by a hash of their names, so that splits do not depend on the order of records."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


@dataclass(kw_only=True)
class Item:
    """What becomes a sample: a photo with its captions, a scene, a text.

    key:    unique; usually of the sample, too
    name:   decides the split; items of one name, such as one image with two prompts, share it
    source: where the item comes from, for messages
    share:  hash of `name` in 0..1; None if the split is given
    origin: name of the source (`Dataset.mixture`) that it belongs to; "" for the only one
    number: its position in its split, set before samples are made
    """

    key: str
    name: str
    source: str
    split: str
    share: float | None = None
    origin: str = ""
    number: int = 0


def hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def hashed_share(name: str, seed: int) -> float:
    return hash64(f"{seed}/{name}") / 2**64


def split_of(share: float) -> str:
    """90 % train, 5 % val, 5 % test."""
    return "train" if share < 0.90 else "val" if share < 0.95 else "test"
