"""Captions of any system, matched with the images of a benchmark. The name of a caption may be the benchmark's, with or
without folders and extension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from src.io.errors import UserError
from src.judges.base import Item
from src.text.captions import Captions, names_of


def match(items: Sequence[Item], captions: Captions, path: Path) -> tuple[list[Item], int]:
    """The items with their captions (None: there is none), and the number of captions of other images.

    Raises UserError if no caption is of an image of the benchmark, or two are of one.
    """
    owners: dict[str, set[str]] = {}
    for item in items:
        for name in names_of([item.key, *([item.image.name] if item.image else [])]):
            owners.setdefault(name, set()).add(item.key)
    texts: dict[str, str] = {}
    unknown = 0
    for name, text in captions.texts.items():
        key = next((next(iter(owners[n])) for n in names_of([name]) if len(owners.get(n, ())) == 1), None)
        if key is None:
            unknown += 1
        elif key in texts:
            raise UserError(f"captions: {path} has two captions of {key!r}; keep one")
        else:
            texts[key] = text
    if not texts:
        name = next(iter(captions.texts), "nothing")
        raise UserError(f"captions: {path} is about other images: it has {name!r}, the benchmark {items[0].key!r}")
    return [replace(item, caption=texts.get(item.key)) for item in items], unknown
