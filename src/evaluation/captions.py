"""Captions of any system, matched with the images of a benchmark. The name of a caption may be the benchmark's, with or
without folders and extension."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.io.errors import UserError
from src.judges.base import Item
from src.metrics.caption import summarise
from src.text.captions import Captions, key_finder, names_of, read_captions

SPEED = "tokens_per_step"


@dataclass(frozen=True)
class System:
    """A system under test.

    items: all of the benchmark, with its captions; others: number of its captions of other images
    """

    captions: Captions
    items: list[Item]
    others: int
    file: Path

    @classmethod
    def read(cls, file: Path, items: Sequence[Item]) -> System:
        captions = read_captions(file)
        return cls(captions, *match(items, captions, file), file)

    @property
    def speed(self) -> dict[str, Any]:
        """`tokens_per_step` of all captions, and a statistic of their `forwards`; None: not stated, or not the same."""
        forwards = list(self.captions.forwards)
        return {SPEED: self.captions.tokens_per_step, "forwards": summarise(forwards) if forwards else None}


def match(items: Sequence[Item], captions: Captions, path: Path) -> tuple[list[Item], int]:
    """The items with their captions (None: there is none), and the number of captions of other images.

    Raises UserError if no caption is of an image of the benchmark, or two are of one.
    """
    find = key_finder({item.key: [item.key, *([item.image.name] if item.image else [])] for item in items})
    texts: dict[str, str] = {}
    unknown = 0
    for name, text in captions.texts.items():
        if (key := find(name)) is None:
            unknown += 1
        elif key in texts:
            raise UserError(f"captions: {path} has two captions of {key!r}; keep one")
        else:
            texts[key] = text
    if not texts:
        name = next(iter(captions.texts), "nothing")
        raise UserError(f"captions: {path} is about other images: it has {name!r}, the benchmark {items[0].key!r}")
    return [replace(item, caption=texts.get(item.key)) for item in items], unknown


def edit_marks(trace: dict[str, Any], text: str) -> list[tuple[int, int, str]]:
    """(start, end, tokens before) of the characters of a caption that its sampler rewrote, from a line of a trace file.

    [] if the text is not the one that the trace ends with.
    """
    special, before = trace["special"], dict[int, list[str]]()
    for step in trace["steps"]:
        for position, old, _ in step["rewritten"]:
            before.setdefault(position, []).append(trace["pieces"][str(old)])
    written, marks = "", list[tuple[int, int, str]]()
    for position, token in enumerate(trace["steps"][-1]["tokens"]):
        if token == special["eot"]:
            break
        piece = "" if token == special["eos"] else trace["pieces"][str(token)]
        start, written = len(written) + len(piece) - len(piece.lstrip()), written + piece
        if position in before and piece.strip():
            marks.append((start, len(written), " → ".join(old.strip() for old in before[position])))
    shift = len(written) - len(written.lstrip())
    return [(a - shift, b - shift, old) for a, b, old in marks] if written.strip() == text else []


def read_marks(system: System) -> dict[str, list[tuple[int, int, str]]]:
    """By key of the item, if there is a trace file beside the captions."""
    file = system.file.with_suffix(".trace.jsonl")
    if not file.exists():
        return {}
    marks, texts = {}, {item.key: item.caption for item in system.items if item.caption}
    with file.open(encoding="utf-8") as stream:
        for trace in map(json.loads, stream):
            key = next((name for name in names_of([trace["key"]]) if name in texts), None)
            if key is not None:
                marks[key] = edit_marks(trace, texts[key])
    return marks
