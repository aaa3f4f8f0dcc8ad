"""Numbered answers in a judge's reply: lines such as `3. B`, whatever their markup, or JSON.

    answers("0. A\n**1)** (c) blue", range(2), read_letter)      {0: "A", 1: "C"}
    values = yield from ask_all(lambda listing: ..., {0: "What?", 1: "Where?"}, read_letter, attempts=3)

An answer belongs to the number before it, so one that is missing, broken or given twice in different ways costs only
itself. A reply with a number that was not asked for is worth nothing: its numbers must be those of something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from typing import Any, TypeVar

from src.chat.reading import json_values, without_thoughts
from src.judges.base import Reply, Request, again

_LINE = re.compile(
    r"^[ \t*_#>\"'(\[-]*(?:q(?:uestion)?\.?[ \t]*)?(\d{1,4})[ \t*_\"']*[.:)\]][ \t*_\"'.:)]*(.*)$",
    re.IGNORECASE | re.MULTILINE,
)
T = TypeVar("T")


def ask_all(
    request: Callable[[str], Request],
    questions: Mapping[int, str],
    read: Callable[[str], T | None],
    *,
    attempts: int,
    gap: str = "\n",
    read_whole: Callable[[str], T | None] = lambda text: None,
) -> Generator[Request, Reply, dict[int, T]]:
    """Ask numbered questions, again those without an answer. Returns the answer to each that got one.

    request: of a listing of questions, `gap` between them; read_whole: of a reply that answers all questions at once
    """
    given: dict[int, T] = {}
    for attempt in range(attempts):
        if not (open_ones := [number for number in questions if number not in given]):
            break
        listing = gap.join(f"{number}. {questions[number]}" for number in open_ones)
        text = (yield again(request(listing), attempt)).text or ""
        if not pairs(text) and (value := read_whole(without_thoughts(text))) is not None:
            given |= dict.fromkeys(open_ones, value)
        given = {**answers(text, questions, read), **given}
    return given


def answers(text: str, numbers: Collection[int], read: Callable[[str], T | None]) -> dict[int, T]:
    """What `read` makes of the text behind each number; it returns None for what is no answer."""
    values: dict[int, set[T]] = {}
    for digits, answer in pairs(text):
        if (number := int(digits)) not in numbers:
            return {}
        if (value := read(answer)) is not None:
            values.setdefault(number, set()).add(value)
    return {number: some.pop() for number, some in values.items() if len(some) == 1}


def pairs(text: str) -> list[tuple[str, str]]:
    """(number, text behind it) in order, of JSON if the reply has some with numbers, otherwise of its lines."""
    text = without_thoughts(text)
    in_json = [pair for value in json_values(text) for pair in _json_pairs(value) if re.fullmatch(r"\d{1,4}", pair[0])]
    return in_json or _LINE.findall(text)


def _json_pairs(value: Any) -> Iterator[tuple[str, str]]:
    """{"0": "A"} or [{"number": 0, "answer": "A"}], either of them also as `answers` of an object."""
    if isinstance(value, dict):
        value = value.get("answers", value)
    if isinstance(value, dict):
        yield from ((str(number), str(answer)) for number, answer in value.items())
    elif isinstance(value, list):
        yield from ((str(v.get("number")), str(v.get("answer"))) for v in value if isinstance(v, dict))
