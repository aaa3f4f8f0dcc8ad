"""An expert model's reply -> edits. A pure function of the text, so a journaled reply can be parsed again offline.

    read_reply('{"right": false, "edits": [{"org": "cat", "target": "dog", "kind": "object"}]}') -> Reading
    read_reply("right") -> Reading without edits

The JSON may be surrounded by prose, code fences and reasoning; of several JSON values the last answer counts. A reply
that cannot be parsed raises UnreadableReply with a reason that the round counts:

    empty           empty, or only whitespace
    malformed       no JSON, and not the word `right`
    wrong_schema    JSON of another schema
    contradiction   "right" with edits, or "wrong" without edits
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from src.chat.replies import clean
from src.types import Edit

KINDS = ("object", "attribute", "count", "place", "relation", "text", "syntax")  # of mistakes, explained in revise.md
SCHEMA = {
    "type": "object",
    "properties": {
        "right": {"type": "boolean"},
        "edits": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    **{name: {"type": "string"} for name in ("org", "target")},
                    "kind": {"type": "string", "enum": list(KINDS)},
                    "reason": {"type": "string"},
                },
                "required": ["org", "target", "kind", "reason"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["right", "edits"],
    "additionalProperties": False,
}
LONGEST = 100_000  # characters of a reply that are parsed
MAX_STARTS = 1000  # brackets tried as the start of a JSON value
MOST_EDITS = 100  # of a reply that are parsed; the others count as malformed
MAX_REASON_CHARS = 200
_RIGHT = re.compile(r"\W*right\W*", re.IGNORECASE)
_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_DECODER = json.JSONDecoder()
UNREADABLE = ("empty", "malformed", "wrong_schema", "contradiction")


class UnreadableReply(ValueError):
    """A reply that cannot be parsed; the message is the reason, one of UNREADABLE."""


@dataclass(frozen=True)
class Reading:
    """The edits of a reply, and the number of items that are not valid edits."""

    edits: tuple[Edit, ...]
    malformed_items: int = 0


def read_reply(text: str) -> Reading:
    """Parse a reply; there are no edits where it says that the draft is right. Raises UnreadableReply."""
    text = _THOUGHTS.sub("", clean(text[:LONGEST])).strip()
    if not text:
        raise UnreadableReply("empty")
    if _RIGHT.fullmatch(text):
        return Reading(())
    values = list(_json_values(text))
    answers = [value for value in values if _is_answer(value)]
    if not answers:
        raise UnreadableReply("wrong_schema" if values else "malformed")
    answer = answers[-1]
    items = answer if isinstance(answer, list) else answer.get("edits", [])
    edits = tuple(edit for item in items[:MOST_EDITS] if (edit := _edit(item)))
    if items and not edits:
        raise UnreadableReply("wrong_schema")
    right = answer.get("right") if isinstance(answer, dict) else None
    if right is not None and right != (not edits):
        raise UnreadableReply("contradiction")
    return Reading(edits, len(items) - len(edits))


def _json_values(text: str) -> Iterator[Any]:
    """The outermost objects and arrays in a text, in order."""
    position = 0
    for _ in range(MAX_STARTS):
        bracket = re.compile(r"[\[{]").search(text, position)
        if not bracket:
            return
        position = bracket.start()
        try:
            value, position = _DECODER.raw_decode(text, position)
            yield value
        except ValueError:
            position += 1
        except RecursionError:
            return


def _is_answer(value: Any) -> bool:
    """Whether a value is an object with `right` or `edits`, or a list of objects (empty: the draft is right)."""
    if isinstance(value, dict):
        edits, right = value.get("edits", []), value.get("right")
        has_answer = "edits" in value or right is True
        return has_answer and isinstance(edits, list) and (right is None or isinstance(right, bool))
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _edit(item: Any) -> Edit | None:
    """An item of `edits` as an Edit; None where it is not valid."""
    if not isinstance(item, dict):
        return None
    org, target, reason = item.get("org"), item.get("target"), item.get("reason", "")
    if not isinstance(org, str) or not isinstance(target, str) or not org:
        return None
    reason = clean(reason)[:MAX_REASON_CHARS] if isinstance(reason, str) else ""
    kind = item.get("kind")
    return Edit(clean(org), clean(target), None, reason, kind if kind in KINDS else "")
