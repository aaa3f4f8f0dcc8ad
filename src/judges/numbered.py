"""Numbered answers in a judge's reply: lines such as `3. B`, whatever their markup, or JSON.

    answers("0. A\n**1)** (c) blue", range(2), read_letter)      {0: "A", 1: "C"}

An answer belongs to the number before it, so one that is missing, broken or given twice in different ways costs only
itself. A reply with a number that was not asked for is worth nothing: its numbers must be those of something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from src.chat.reading import json_values, said

_LINE = re.compile(
    r"^[ \t*_#>\"'(\[-]*(?:q(?:uestion)?\.?[ \t]*)?(\d{1,4})[ \t*_\"']*[.:)\]][ \t*_\"'.:)]*(.*)$",
    re.IGNORECASE | re.MULTILINE,
)
T = TypeVar("T")


def answers(text: str, asked: Sequence[int], read: Callable[[str], T | None]) -> dict[int, T]:
    """What `read` makes of the text behind each number; it returns None for what is no answer."""
    numbers, found = {str(number): number for number in asked}, dict[int, set[T]]()
    for number, answer in pairs(text):
        if number not in numbers:
            return {}
        if (value := read(answer)) is not None:
            found.setdefault(numbers[number], set()).add(value)
    return {number: values.pop() for number, values in found.items() if len(values) == 1}


def pairs(text: str) -> list[tuple[str, str]]:
    """(number, text behind it) in order, of JSON if the reply has some with numbers, otherwise of its lines."""
    text = said(text)
    in_json = [pair for value in json_values(text) for pair in _json_pairs(value) if pair[0].isdecimal()]
    return in_json or _LINE.findall(text)


def _json_pairs(value: Any) -> Iterator[tuple[str, str]]:
    """{"0": "A"} or [{"number": 0, "answer": "A"}], either of them also as `answers` of an object."""
    if isinstance(value, dict):
        value = value.get("answers", value)
    if isinstance(value, dict):
        yield from ((str(number), str(answer)) for number, answer in value.items())
    elif isinstance(value, list):
        yield from ((str(v.get("number")), str(v.get("answer"))) for v in value if isinstance(v, dict))
