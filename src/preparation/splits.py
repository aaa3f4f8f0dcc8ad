"""Assign items to splits by a hash of their names, so that splits do not depend on the order of records."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from src.preparation.counts import Skip

SPLITS = ("train", "val", "test")
OTHER_NAMES = {"training": "train", "restval": "train", "valid": "val", "validation": "val", "dev": "val"}
SPLIT_NAMES = {**{split: split for split in SPLITS}, **OTHER_NAMES}  # restval: of Karpathy's splits


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


def split_named(value: Any) -> str | None:
    """The split that the field `split` of a record names; None if it is empty. Raises `Skip` if that is no split."""
    if value is None or value == "":
        return None
    if not isinstance(value, str) or value.strip().lower() not in SPLIT_NAMES:
        raise Skip("unknown_split", f" ({str(value)[:40]})")
    return SPLIT_NAMES[value.strip().lower()]


def hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def hashed_share(name: str, seed: int) -> float:
    return hash64(f"{seed}/{name}") / 2**64


def split_of(share: float) -> str:
    """90 % train, 5 % val, 5 % test."""
    return "train" if share < 0.90 else "val" if share < 0.95 else "test"
