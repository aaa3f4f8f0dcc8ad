"""An expert model's reply -> edits. A pure function of the text, so a journaled reply can be parsed again offline.

    read_reply('{"right": false, "edits": [{"org": "cat", "target": "dog", "kind": "object"}]}') -> (edits, 0)
    read_reply("right") -> ((), 0)

The JSON may be surrounded by prose, code fences and reasoning; of several JSON values the last answer counts. A reply
that cannot be parsed raises Unanswered with a reason that the round counts:

    empty           empty, or only whitespace
    malformed       no JSON, and not the word `right`
    wrong_schema    JSON of another schema
    contradiction   "right" with edits, or "wrong" without edits
"""

from __future__ import annotations

import re
from typing import Any

from src.chat.client import Unanswered, clean
from src.chat.reading import json_values, without_thoughts
from src.types import Edit

KINDS = ("object", "attribute", "count", "place", "relation", "text", "syntax")  # of mistakes, explained in revise.md
_FIELDS = ("org", "target", "kind", "reason")
_ITEM = {
    "type": "object",
    "properties": {
        "org": {"type": "string"},
        "target": {"type": "string"},
        "kind": {"type": "string", "enum": list(KINDS)},
        "reason": {"type": "string"},
    },
    "required": list(_FIELDS),
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {"right": {"type": "boolean"}, "edits": {"type": "array", "items": _ITEM}},
    "required": ["right", "edits"],
    "additionalProperties": False,
}
UNREADABLE = ("empty", "malformed", "wrong_schema", "contradiction")
MOST_EDITS = 100  # of a reply that are parsed; the others count as malformed
MAX_REASON_CHARS = 200
_RIGHT = re.compile(r"\W*right\W*", re.IGNORECASE)


def read_reply(text: str) -> tuple[tuple[Edit, ...], int]:
    """The edits of a reply, none where the draft is right, and its number of malformed items. Raises Unanswered."""
    text = without_thoughts(text)
    if not text:
        raise Unanswered("empty", retry=True)
    if _RIGHT.fullmatch(text):
        return (), 0
    values = list(json_values(text))
    answers = [value for value in values if _is_answer(value)]
    if not answers:
        raise Unanswered("wrong_schema" if values else "malformed", retry=True)
    answer = answers[-1] if isinstance(answers[-1], dict) else {"edits": answers[-1]}
    items, right = answer.get("edits", []), answer.get("right")
    edits = []
    for item in items[:MOST_EDITS]:
        org, target, kind, reason = (item.get(name) if isinstance(item, dict) else None for name in _FIELDS)
        if org and isinstance(org, str) and isinstance(target, str):
            reason = clean(reason)[:MAX_REASON_CHARS] if isinstance(reason, str) else ""
            edits.append(Edit(clean(org), clean(target), None, reason, kind if kind in KINDS else ""))
    if items and not edits:
        raise Unanswered("wrong_schema", retry=True)
    if right is not None and right != (not edits):
        raise Unanswered("contradiction", retry=True)
    return tuple(edits), len(items) - len(edits)


def _is_answer(value: Any) -> bool:
    """Whether a value is an object with `right` or `edits`, or a list of objects (empty: the draft is right)."""
    if isinstance(value, list):
        return all(isinstance(item, dict) for item in value)
    has_answer = "edits" in value or value.get("right") is True
    return has_answer and isinstance(value.get("edits", []), list) and value.get("right") in (None, True, False)
