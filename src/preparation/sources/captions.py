"""Plain records: an image with a caption, or a list of captions, under any of `CAPTION_KEYS`."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any

from src.preparation.counts import Counts, Skip
from src.preparation.sources.base import CAPTION_KEYS, PROMPT_KEYS, Caption, caption_text

EMPTY = {"", "nan", "none", "null"}  # written into a table for no value


def caption_key(record: dict) -> str | None:
    """The key of the captions. `text` is none where it is the question of a benchmark."""
    is_question = "label" in record or ("question_id" in record and "prompt" not in record)
    return next((key for key in CAPTION_KEYS if key in record and not (key == "text" and is_question)), None)


def matches(record: dict) -> bool:
    return caption_key(record) is not None


def parse(record: dict, place: str, counts: Counts) -> tuple[list[Caption], Any]:
    is_empty = lambda value: value is None or str(value).strip().lower() in EMPTY  # noqa: E731
    captions, values = [], list(flatten(record[caption_key(record) or ""])) or [None]
    for value in values:
        try:
            captions.append(Caption(caption_text(None if is_empty(value) else value)))
        except Skip as reason:
            if len(values) == 1:
                raise
            counts.skip(reason, place)
    if not captions:
        raise Skip("empty_caption")
    return captions, next((record[key] for key in PROMPT_KEYS if not is_empty(record.get(key))), None)


def flatten(value: Any) -> Iterator[Any]:
    """The captions in nested lists, in records, or in a list that a cell of a table holds as text."""
    if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
        for read in (json.loads, ast.literal_eval):
            try:
                listed = read(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            value = listed if isinstance(listed, list) and listed and all(isinstance(v, str) for v in listed) else value
            break
    if isinstance(value, dict):
        value = next((value[key] for key in ("raw", *CAPTION_KEYS) if key in value), value)
    if isinstance(value, list | tuple):
        for item in value:
            yield from flatten(item)
    else:
        yield value
