"""Captions of any system, from a file.

    read_captions(Path("mine.jsonl"))      a line per caption, as `src.generate` and many others write it
    read_captions(Path("mine.json"))       {"file.jpg": "A caption."}, as CapMAS wants it, or a list of records

A record has a name of its image (`key`, `image`, `image_id`, `file_name`) and a text (`text`, `caption`, ...). The name
may have folders and an extension, or not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from src.io.errors import UserError
from src.io.files import sha256

NAMES = ("key", "image", "image_id", "file_name", "filename", "img")
TEXTS = ("text", "caption", "response", "answer", "output")
SPECIAL = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?s>|\[(?:MASK|PAD|UNK|CLS|SEP)\]|<(?:mask|pad|unk|bos|eos|image)>")
SETTINGS = ("prompt", "length")  # of the protocol, which lines of `src.generate` hold


@dataclass(frozen=True)
class Captions:
    """texts: by name of the image; cleaned: number of texts that special tokens were removed from
    settings: what every line says of `prompt` and `length`; None: not stated
    tokens_per_step: likewise; forwards: forward calls of each caption that states them
    """

    texts: dict[str, str]
    sha256: str
    cleaned: int
    settings: dict[str, Any]
    tokens_per_step: int | None = None
    forwards: Sequence[float] = ()


def read_captions(path: Path) -> Captions:
    """Raises UserError for a file of another form, or with two captions of one image."""
    try:
        content = path.read_text("utf-8-sig")
        if path.suffix == ".jsonl":
            records = [_parse(line, number) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
        else:
            records = json.loads(content)
        if isinstance(records, dict):
            records = [{"key": name, "text": text} for name, text in records.items()]
        pairs = [(str(_one_of(NAMES, record)), _one_of(TEXTS, record)) for record in records]
        texts = {name: _clean(text, name) for name, text in pairs}
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
    speeds, forwards = ([r[name] for r in records if name in r] for name in ("tokens_per_step", "forwards"))
    cleaned = sum(texts[name] != text.strip() for name, text in pairs)
    return Captions(texts, sha256(path), cleaned, settings, speeds[0] if len(set(speeds)) == 1 else None, forwards)


def names_of(names: Iterable[str]) -> list[str]:
    """Each name, without its extension, without its folders, and without both."""
    paths = [PurePosixPath(name) for name in names]
    shorter = [*(str(path.parent / path.stem) for path in paths), *(path.name for path in paths)]
    return list(dict.fromkeys([*map(str, paths), *shorter, *(path.stem for path in paths)]))


def key_finder(names: Mapping[str, Iterable[str]]) -> Callable[[str], str | None]:
    """A function from a name to the key that it means, by the names of each key: the key itself before all others, then
    the only one of which it leaves out folders or extension. None if there is none, or several."""
    keys: dict[str, str | None] = {}
    for key, some in names.items():
        for name in names_of(some):
            keys[name] = key if keys.get(name, key) == key else None
    keys |= {names_of([key])[0]: key for key in names}
    return lambda name: next((keys[other] for other in names_of([name]) if keys.get(other) is not None), None)


def _parse(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}, {error}") from error


def _one_of(keys: Sequence[str], record: dict[str, Any]) -> Any:
    if key := next((key for key in keys if key in record), None):
        return record[key]
    raise ValueError(f"{str(record)[:80]} has none of {', '.join(keys)}")


def _clean(text: Any, name: str) -> str:
    """Without special tokens, which some systems leave in; runs of blanks where they were become one. Halves of
    characters, which no file can hold, become question marks."""
    if not isinstance(text, str):
        raise TypeError(f"the caption of {name!r} is {text!r}, not a text")
    text = re.sub(r"[ \t]{2,}", " ", SPECIAL.sub(" ", text)) if SPECIAL.search(text) else text
    return text.strip().encode("utf-8", "replace").decode()
