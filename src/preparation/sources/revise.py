"""ReDiff: conversations whose answer has errors, with {"revise": [{"org": false span, "target": true span}]}; or a
plain record whose one caption has."""

from __future__ import annotations

import json
import re
from typing import Any

from src.preparation.counts import Counts, Skip
from src.preparation.sources import captions, conversations
from src.preparation.sources.base import Caption, caption_text, clean
from src.scenes.grammar import Swap


def matches(record: dict) -> bool:
    return "revise" in record and (conversations.matches(record) or captions.matches(record))


def parse(record: dict, place: str, counts: Counts) -> tuple[list[Caption], Any]:
    if not conversations.matches(record):
        (draft, *others), question = captions.parse(record, place, counts)
        if others:
            raise Skip("revise_of_several_captions")
        return [corrected(draft.text, record["revise"])], question
    question, draft = conversations.first_turns(record, place, counts)
    return [corrected(caption_text(draft), record["revise"])], question


def corrected(draft: str, edits: Any) -> Caption:
    """The draft with all edits applied, and its errors as swaps. Raises Skip if an edit does not apply."""
    if isinstance(edits, str):
        try:
            edits = json.loads(edits)
        except ValueError:
            raise Skip("revise_not_a_list") from None
    edits = [edits] if isinstance(edits, dict) else edits
    if not isinstance(edits, list):  # without its edits the draft would be trained as it is, errors and all
        raise Skip("revise_not_a_list")
    spans: list[tuple[int, str, str]] = []
    for edit in edits:
        org, target = (edit.get("org"), edit.get("target")) if isinstance(edit, dict) else (None, None)
        if not (isinstance(org, str) and isinstance(target, str) and org and target):
            raise Skip("revise_empty_span")
        org, target = clean(org), clean(target)
        # the only occurrence; those as whole words take precedence
        starts = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(org)}(?!\w)", draft)]
        starts = starts or [m.start() for m in re.finditer(re.escape(org), draft)]
        if len(starts) != 1:
            raise Skip("revise_ambiguous" if starts else "revise_not_found")
        spans.append((starts[0], org, target))
    text, done, swaps = "", 0, []
    for start, org, target in sorted(spans):
        if start < done:
            raise Skip("revise_overlap")
        text += draft[done:start]
        swaps.append(Swap(len(text), len(text) + len(target), target, org, "phrase"))
        text, done = text + target, start + len(org)
    return Caption(text + draft[done:], swaps)
