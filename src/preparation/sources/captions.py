"""Plain records: an image with a caption, or a list of captions, under any of `CAPTION_KEYS`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from src.preparation.counts import Counts, Skip
from src.preparation.records import NAN, check_turns, with_input
from src.preparation.sources.base import ANSWER_KEYS, CAPTION_KEYS, PROMPT_KEYS, Caption, caption_text

EMPTY = {*NAN, "", "none", "null", "n/a"}  # written into a table for no value
PRINTED = re.compile(r"\s*([\[{]|\(['\"]|array\().*[]})]\s*", re.DOTALL)


def caption_key(record: dict) -> str | None:
    """The key of the captions: the first that is not null. A record with an answer has none: what it asks, and hints
    for it, stand under such keys. Nor is `text` one where it is the question of a benchmark, or Alpaca's template."""
    if any(record.get(key) not in (None, "", []) for key in ANSWER_KEYS):
        return None
    is_question = record.get("label") is not None or ("question_id" in record and "prompt" not in record)
    is_other = is_question or {"instruction", "output"} <= record.keys()
    keys = [key for key in CAPTION_KEYS if key in record and not (key == "text" and is_other)]
    return next((key for key in keys if record[key] is not None), keys[0] if keys else None)


def matches(record: dict) -> bool:
    return caption_key(record) is not None


def parse(record: dict, place: str, counts: Counts) -> tuple[list[Caption], Any]:
    is_empty = lambda value: value is None or str(value).strip().lower() in EMPTY  # noqa: E731
    values = [value for value in flatten(record[caption_key(record) or ""]) if not is_empty(value)]
    if not values:
        raise Skip("empty_caption")
    key = next((key for key in PROMPT_KEYS if not is_empty(record.get(key))), None)
    question = record[key] if key else None
    if key == "instruction" and isinstance(question, str):
        check_turns(record)
        question = with_input(question, record)
    return [Caption(caption_text(value)) for value in values], question


def flatten(value: Any) -> Iterator[Any]:
    """The captions in nested lists, in records, or in a list that a cell of a table holds as text.

    Raises Skip for a printed list that cannot be read, such as one of NumPy: ['A cat.' 'A dog.'].
    """
    if isinstance(value, str) and PRINTED.fullmatch(value):
        value = listed(value.strip())
    if isinstance(value, dict):
        value = next((value[key] for key in ("raw", *CAPTION_KEYS) if key in value), value)
    if isinstance(value, list | tuple):
        for item in value:
            yield from flatten(item)
    else:
        yield value


def listed(text: str) -> Any:
    """The value of a list or mapping in JSON, or as Python prints it."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = read(text)
            if read is json.loads or repr(value) == text:  # Python joins strings without a comma between them
                return value
    raise Skip("unreadable_list")
