"""COCO: tables of images and annotations that name them by id, Karpathy's splits of it, and its two spellings of names.

COCO_val2014_000000000042.jpg, 000000000042.jpg and 42 are one picture: ids are unique over all years and splits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

PREFIX = re.compile(r"^COCO_(train|val|test)\d{4}_")
PREFIXES = ("COCO_train2014_", "COCO_val2014_", "COCO_test2014_", "COCO_test2015_")
FOLDER = re.compile(r"coco|(train|val|test)20\d\d", re.IGNORECASE)
ID = re.compile(r"\d{12}")


def join(pairs: Callable[[], Iterator[tuple[str, Any, bool]]]) -> Iterator[Any]:
    """The annotations of a file, each with the name of its image. pairs: reads the file from its start."""
    names: dict[str, Any] = {}
    for key, row, _ in pairs():
        if key == "images" and isinstance(row, dict):
            number, name = str(row.get("id")), row.get("file_name")
            names[number] = name if names.get(number, name) == name else None  # None: two images of one id
    for key, row, _ in pairs():
        if key == "annotations":
            if isinstance(row, dict):  # an id that is in no row names no image, not the file of that number
                row = {**row, "image_id": None, "image": names.get(str(row.get("image_id")))}
            yield row


def flatten(record: dict) -> dict:
    """A record of Karpathy's dataset_coco.json: {"filename", "filepath"?, "sentences": [{"raw"}], "split"}."""
    folder, name = record.get("filepath"), record.get("filename")
    return {**record, "image": f"{folder}/{name}"} if folder and name else record


def is_coco(name: str) -> bool:
    """Whether a path names a picture of COCO, whatever folder it is in."""
    *folders, base = name.split("/")
    is_id = bool(ID.fullmatch(base.partition(".")[0])) and any(map(FOLDER.search, folders))
    return bool(PREFIX.search(base)) or is_id


def spellings(base: str) -> list[str]:
    """The other names of a picture: without COCO's prefix, or with each of them; with zeros before a bare number."""
    stem, dot, ending = base.partition(".")
    plain = PREFIX.sub("", stem)
    if not plain.isdecimal() or (dot and not ID.fullmatch(plain)):
        return []
    plain = plain.zfill(12)
    return [name + dot + ending for name in (plain, *(prefix + plain for prefix in PREFIXES))]
