"""Find the file of an image by the name in a record.

A picture that is not there is never replaced by another one of the same name: leading folders of a name are dropped
only where the images' folder ends with them, or where the name is of COCO, whose numbers are unique.
"""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from src.preparation.counts import Skip
from src.preparation.sources import coco

_SPLIT = re.compile(r"train|val|test", re.IGNORECASE)

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")


@dataclass
class Match:
    """is_exact: the name is relative to the folder, or to one above it; is_certain: so, or the name is of COCO."""

    path: Path
    is_exact: bool
    is_certain: bool


class Images:
    """A folder of images."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._above = [_folded(part) for part in root.resolve().parts]
        self._names = lru_cache(maxsize=64)(_names)  # of folders in which a name is not found as it is spelt

    def find(self, name: str) -> Match | None:
        """The image of a name: as it is spelt; composed or decomposed, its ending in another case; with each ending, if
        it has none; as COCO spells it. All this without some of its leading folders, too. Raises `Skip` for several."""
        parts = posixpath.normpath(name.replace("\\", "/")).strip("/").split("/")
        elsewhere = os.path.isabs(name) and os.path.isfile(name) and not Path(name).is_relative_to(self.root.absolute())
        if parts[0] == ".." or elsewhere:
            return None
        for dropped in range(len(parts)):
            splits = [_SPLIT.findall(folder.lower()) for folder in (*parts[dropped - 1 : dropped], self.root.name)]
            if len(splits) > 1 and all(splits) and splits[0] != splits[1]:
                return None  # the folder of another split
            folder: str | None = str(self.root)
            for part in parts[dropped:-1]:
                inner = os.path.join(folder, part)
                folder = inner if os.path.isdir(inner) else self._same(folder, [part])
                if folder is None:
                    break
            if folder is not None and (path := self._in(folder, parts[-1])):
                is_exact = not dropped or self._above[-dropped:] == [_folded(part) for part in parts[:dropped]]
                return Match(Path(path), is_exact, is_exact or coco.is_coco("/".join(parts)))
        return None

    def _in(self, folder: str, base: str) -> str | None:
        if os.path.isfile(path := os.path.join(folder, base)):  # False for invalid names, too
            return path
        for names in ([base], coco.spellings(base)):
            if path := self._same(folder, names):
                return path
            endings = () if os.path.splitext(base)[1].lower() in SUFFIXES else SUFFIXES
            if path := self._same(folder, [name + ending for name in names for ending in endings]):
                return path
        return None

    def _same(self, folder: str, names: Iterable[str]) -> str | None:
        """The only file or folder that has one of these names, up to composition and the case of its ending."""
        listed = self._names(folder)
        present = [same for name in names for same in listed.get(_folded(name), ())]
        if len(present) > 1:
            raise Skip("ambiguous_image", f" (it may be {' or '.join(present[:3])})")
        return os.path.join(folder, present[0]) if present else None


def _names(folder: str) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        names.setdefault(_folded(name), []).append(name)
    return names


def _folded(name: str) -> str:
    stem, dot, ending = unicodedata.normalize("NFC", name).rpartition(".")
    return stem + dot + ending.lower() if dot else ending
