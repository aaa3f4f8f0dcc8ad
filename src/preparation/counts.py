"""Counts of records, images and captions by what became of them, with examples, shown as a table.

    counts = Counts()
    counts["merged"] += 1
    counts.note("missing_image", "a/b.jpg")     counts it, and keeps the first name as the example
    table({"train": counts}, {"train": counts.examples})

Reasons are keys in index.json; `MEANING` is how the table words them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

MEANING = {
    "written": "samples written",
    "swaps": "hallucinated spans kept",
    "swaps of unequal length": "hallucinated spans of other token length (not used)",
    "captions too long": "captions too long (left out)",
    "captions redrawn": "captions too long (drawn again)",
    "no_usable_caption": "images without a usable caption (left out)",
    "records": "records read",
    "merged": "merged into one image",
    "duplicate_caption": "captions that the image already has (left out)",
    "duplicate_id": "ids of an earlier record (record still used)",
    "later_turns": "later turns of conversations (not used)",
    "unknown_split": "with an unknown split (split by the image's name)",
    "unknown_format": "in an unknown format (left out)",
    "not_a_record": "values that are not a record (left out)",
    "broken_json": "broken JSON (left out)",
    "no_image": "without an image (left out)",
    "several_images": "with several images (left out)",
    "image_in_later_turn": "with the image in a later turn (left out)",
    "video": "about a video (left out)",
    "no_answer": "conversations without an answer (left out)",
    "empty_caption": "empty captions (left out)",
    "swap_not_found": "hallucinated spans without a match in their caption (not used)",
    "revise_empty_span": "edits with an empty span (record left out)",
    "revise_overlap": "edits that overlap (record left out)",
    "revise_not_found": "edits of text that is not in the answer (record left out)",
    "revise_ambiguous": "edits of text that is in the answer more than once (record left out)",
    "missing_image": "image files that are missing (left out)",
    "empty_image_file": "image files that are empty (left out)",
    "image_too_large": "images with too many pixels (left out)",
    "undecodable_image": "image files that cannot be decoded (left out)",
    "not_utf8": "texts or lines that are not UTF-8 (left out)",
    "missing_field": "without one of the fields (left out)",
    "not_a_text": "with a field that is not text (left out)",
    "not_a_number": "with a field that is not a number (left out)",
    "empty_text": "empty texts (left out)",
    "carriage_returns": "with CRLF or CR line ends (changed to LF)",
    "duplicate_text": "that repeat an earlier one (left out)",
    "image_mark": "with an image mark but no image (left out)",
    "prompts too long": "prompts too long (left out)",
    "responses too long": "responses too long (left out)",
    "not_in_vocabulary": "with characters that the tokenizer lacks (left out)",
    "special_token": "with a special token in the prompt (left out)",
    "broken_smiles": "SMILES with a bracket, branch or ring left open (left out)",
    "broken_row": "unreadable table rows (left out)",
    "class_1": "of them of class 1",
    "tokens_left": "tokens at the end that do not fill a row (left out)",
}
RAISE_LENGTH = "; to keep them, raise prepare.response_length, and data.response_length with it"
ADVICE = {
    "captions too long": RAISE_LENGTH,
    "responses too long": RAISE_LENGTH,
    "prompts too long": "; to keep them, raise prepare.max_prompt",
}


class Counts(Counter[str]):
    """Counts by reason. `examples`: the first name given for a reason."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}

    def note(self, reason: str, example: str) -> None:
        """Count a reason once, and keep the first example of it."""
        self[reason] += 1
        self.examples.setdefault(reason, example)


def table(counts: Mapping[str, Mapping[str, int]], examples: Mapping[str, Mapping[str, str]]) -> str:
    """One line per part and reason: part, number, meaning, example.

    `written` comes first in a part, even if it is 0.
    """
    rows = [
        (part, reason, number)
        for part, numbers in counts.items()
        for reason, number in sorted(numbers.items(), key=lambda row: row[0] != "written")
        if number or reason == "written"
    ]
    width = max((len(part) for part, _, _ in rows), default=0)
    digits = max((len(str(number)) for _, _, number in rows), default=0)
    lines = []
    for part, reason, number in rows:
        example = examples.get(part, {}).get(reason)
        suffix = f", such as {example}" if example else ""
        lines.append(
            f"{part:{width}}  {number:>{digits}}  {MEANING.get(reason, reason)}{suffix}{ADVICE.get(reason, '')}"
        )
    return "\n".join(lines)
