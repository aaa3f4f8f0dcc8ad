"""Captions of any system, from a file.

    read_captions(Path("mine.jsonl"))      a line per caption, as `src.generate` and many others write it
    read_captions(Path("mine.json"))       {"file.jpg": "A caption."}, as CapMAS wants it, or a list of records

A record has a name of its image (`key`, `image`, `image_id`, `file_name`) and a text (`text`, `caption`, ...). The name
may have folders and an extension, or not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
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
    """

    texts: dict[str, str]
    sha256: str
    cleaned: int
    settings: dict[str, Any]


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
    return Captions(texts, sha256(path), sum(texts[name] != text.strip() for name, text in pairs), settings)


def names_of(names: Iterable[str]) -> list[str]:
    """Each name, without its folders, and without its extension."""
    paths = [PurePosixPath(name) for name in names]
    return list(dict.fromkeys([*map(str, paths), *(path.name for path in paths), *(path.stem for path in paths)]))


def _one_of(keys: Sequence[str], record: dict[str, Any]) -> Any:
    return record[next((key for key in keys if key in record), keys[0])]


def _clean(text: str) -> str:
    """Without special tokens, which some systems leave in; runs of blanks where they were become one."""
    return re.sub(r"[ \t]{2,}", " ", SPECIAL.sub(" ", text)).strip() if SPECIAL.search(text) else text.strip()
