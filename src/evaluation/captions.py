"""Captions of any system, matched with the images of a benchmark.

    read_captions(Path("mine.jsonl"))      a line per caption, as `src.generate` and many others write it
    read_captions(Path("mine.json"))       {"file.jpg": "A caption."}, as CapMAS wants it, or a list of records

A record has a name of its image (`key`, `image`, `image_id`, `file_name`) and a text (`text`, `caption`, ...). The name
may be the benchmark's, with or without folders and extension.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from src.io.errors import UserError
from src.io.files import sha256
from src.judges.base import Item
from src.metrics.caption import summarise
from src.metrics.text import SPECIAL

NAMES = ("key", "image", "image_id", "file_name", "filename", "img")
TEXTS = ("text", "caption", "response", "answer", "output")
SETTINGS = ("prompt", "length")  # of the protocol, which lines of `src.generate` hold
SPEED = "tokens_per_step"


@dataclass(frozen=True)
class Captions:
    """texts: by name of the image; cleaned: number of texts that special tokens were removed from
    settings: what every line says of `prompt` and `length`; None: not stated
    speed: `tokens_per_step` likewise, and the `forwards` of a caption, its forward calls
    """

    texts: dict[str, str]
    sha256: str
    cleaned: int
    settings: dict[str, Any]
    speed: dict[str, Any]


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


def read_captions(path: Path) -> Captions:
    """Raises UserError for a file of another form, or with two captions of one image."""
    try:
        content = path.read_text("utf-8-sig")
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in content.split("\n") if line.strip()]
        else:
            records = json.loads(content)
        if isinstance(records, dict):
            records = [{"key": name, "text": text} for name, text in records.items()]
        pairs = [(str(_one_of(NAMES, record)), _one_of(TEXTS, record)) for record in records]
        texts = {name: _clean(text) for name, text in pairs}
    except (OSError, ValueError, LookupError, TypeError) as error:
        forms = '{"key": "a.jpg", "text": "A caption."} a line (.jsonl), or {"a.jpg": "A caption."} (.json)'
        raise UserError(f"captions: {path} cannot be read as {forms}: {error}") from error
    if len(texts) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"captions: {path} has two captions of {twice!r}; keep one")
    stated = {name: {record.get(name) for record in records} for name in SETTINGS}
    if mixed := [name for name in SETTINGS if len(stated[name]) > 1]:
        raise UserError(f"captions: {path} mixes values of {mixed[0]}: {', '.join(map(str, stated[mixed[0]]))}")
    settings = {name: next(iter(values), None) for name, values in stated.items()}
    speeds, forwards = ([r[name] for r in records if name in r] for name in (SPEED, "forwards"))
    speed = {SPEED: speeds[0] if len(set(speeds)) == 1 else None, "forwards": summarise(forwards) if forwards else None}
    return Captions(texts, sha256(path), sum(texts[name] != text.strip() for name, text in pairs), settings, speed)


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


def names_of(names: Iterable[str]) -> list[str]:
    """Each name, without its folders, and without its extension."""
    paths = [PurePosixPath(name) for name in names]
    return list(dict.fromkeys([*map(str, paths), *(path.name for path in paths), *(path.stem for path in paths)]))


def _one_of(keys: Sequence[str], record: dict[str, Any]) -> Any:
    return record[next((key for key in keys if key in record), keys[0])]


def _clean(text: str) -> str:
    """Without special tokens, which some systems leave in; runs of blanks where they were become one."""
    return re.sub(r"[ \t]{2,}", " ", SPECIAL.sub(" ", text)).strip() if SPECIAL.search(text) else text.strip()
