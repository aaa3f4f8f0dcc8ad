"""What a model says in a reply: the text without its reasoning, and the JSON in it.

without_thoughts("<think>hm</think> Sure: {\"right\": true}")     'Sure: {"right": true}'
list(json_values('Sure: {"right": true} [1]'))       [{"right": True}, [1]]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from src.chat.client import clean

LONGEST = 100_000  # characters of a reply that are parsed
MAX_STARTS = 1000  # brackets tried as the start of a JSON value
_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_BRACKET = re.compile(r"[\[{]")


def without_thoughts(text: str) -> str:
    """The text without reasoning in tags and without blanks around it."""
    return _THOUGHTS.sub("", clean(text[:LONGEST])).strip()


def json_values(text: str) -> Iterator[Any]:
    """The outermost objects and arrays in a text, in order."""
    position, decoder = 0, json.JSONDecoder()
    for _ in range(MAX_STARTS):
        if not (bracket := _BRACKET.search(text, position)):
            return
        position = bracket.start()
        try:
            value, position = decoder.raw_decode(text, position)
            yield value
        except ValueError:
            position += 1
        except RecursionError:
            return
