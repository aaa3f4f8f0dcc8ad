"""An expert model's reply -> edits. A pure function of the text, so that a kept reply can be read again without a call.

    read_reply('{"right": false, "edits": [{"org": "cat", "target": "dog", "kind": "object"}]}') -> Reading
    read_reply("right") -> Reading without edits

Around the JSON there may be prose, code fences and a model's thoughts; of several values the last one counts. What
cannot be read raises UnreadableReply, whose reason is counted:

    empty           nothing, or blanks
    malformed       no JSON, and not the word `right`
    wrong_schema    JSON of another form
    contradiction   "right" with edits, or "wrong" without any
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from src.chat.replies import clean
from src.types import Edit

KINDS = ("object", "attribute", "count", "place", "relation", "text", "syntax")  # of mistakes; revise.md explains them
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
LONGEST = 100_000  # characters of a reply that are looked at
MOST_STARTS = 1000  # brackets that are tried as the start of a JSON value
MOST_EDITS = 100  # of a reply that are looked at; the others count as malformed
LONGEST_REASON = 200  # characters
_RIGHT = re.compile(r"\W*right\W*", re.IGNORECASE)
_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_DECODER = json.JSONDecoder()


UNREADABLE = ("empty", "malformed", "wrong_schema", "contradiction")


class UnreadableReply(ValueError):
    """A reply that says nothing usable; the message is the reason that is counted, one of UNREADABLE."""


@dataclass(frozen=True)
class Reading:
    """The edits of a reply, and how many of its items were none."""

    edits: tuple[Edit, ...]
    malformed_items: int = 0


def read_reply(text: str) -> Reading:
    """The edits of a reply; none where it says that the draft is right."""
    text = _THOUGHTS.sub("", clean(text[:LONGEST])).strip()
    if not text:
        raise UnreadableReply("empty")
    if _RIGHT.fullmatch(text):
        return Reading(())
    values = list(_json_values(text))
    known = [value for value in values if _is_answer(value)]
    if not known:
        raise UnreadableReply("wrong_schema" if values else "malformed")
    answer = known[-1]
    items = answer if isinstance(answer, list) else answer.get("edits", [])
    edits = tuple(edit for item in items[:MOST_EDITS] if (edit := _edit(item)))
    if items and not edits:
        raise UnreadableReply("wrong_schema")
    said_right = answer.get("right") if isinstance(answer, dict) else None
    if said_right is not None and said_right != (not edits):
        raise UnreadableReply("contradiction")
    return Reading(edits, len(items) - len(edits))


def _json_values(text: str) -> Iterator[Any]:
    """The objects and arrays in a text, in order, without what is inside another."""
    place = 0
    for _ in range(MOST_STARTS):
        found = re.compile(r"[\[{]").search(text, place)
        if not found:
            return
        place = found.start()
        try:
            value, place = _DECODER.raw_decode(text, place)
            yield value
        except ValueError:
            place += 1
        except RecursionError:
            return


def _is_answer(value: Any) -> bool:
    """An object with `right` or `edits`, or a list of objects; an empty one says that there is nothing to edit."""
    if isinstance(value, dict):
        edits, right = value.get("edits", []), value.get("right")
        named = "edits" in value or right is True
        return named and isinstance(edits, list) and (right is None or isinstance(right, bool))
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _edit(item: Any) -> Edit | None:
    if not isinstance(item, dict):
        return None
    org, target, reason = item.get("org"), item.get("target"), item.get("reason", "")
    if not isinstance(org, str) or not isinstance(target, str) or not org:
        return None
    reason = clean(reason)[:LONGEST_REASON] if isinstance(reason, str) else ""
    kind = item.get("kind")
    return Edit(clean(org), clean(target), None, reason, kind if kind in KINDS else "")
