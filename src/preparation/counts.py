"""What became of records, images and captions: counted by reason, some with an example, and shown as a table.

    counts = Counts()
    counts["merged"] += 1
    counts.note("missing_image", "a/b.jpg")     counted as well; the first name is kept as the example
    table({"train": counts}, {"train": counts.examples})

Reasons are the keys in index.json; what they mean to a user is in `MEANING`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

MEANING = {
    "written": "samples written",
    "swaps": "false spans kept",
    "swaps of unequal length": "false spans of other token length (not used)",
    "captions too long": "captions too long (left out)",
    "captions redrawn": "captions too long (drawn again)",
    "no_usable_caption": "images left without a caption",
    "records": "records read",
    "merged": "merged into one image",
    "duplicate_caption": "captions that an image has already",
    "duplicate_id": "ids that an earlier record has (used all the same)",
    "later_turns": "later turns of conversations (not used)",
    "unknown_split": "of an unknown split (split by the image's name)",
    "unknown_format": "of an unknown format (left out)",
    "not_a_record": "values that are no record (left out)",
    "broken_json": "broken JSON (left out)",
    "no_image": "without an image (left out)",
    "several_images": "with several images (left out)",
    "image_in_later_turn": "with the image in a later turn (left out)",
    "video": "of a video (left out)",
    "no_answer": "conversations without an answer (left out)",
    "empty_caption": "empty captions (left out)",
    "swap_not_found": "false spans that are not in their caption (not used)",
    "revise_empty_span": "corrections that are empty (record left out)",
    "revise_overlap": "corrections that overlap (record left out)",
    "revise_not_found": "corrections that are not in the text (record left out)",
    "revise_ambiguous": "corrections of what is in the text more than once (record left out)",
    "missing_image": "image files that are missing (left out)",
    "empty_image_file": "image files that are empty (left out)",
    "image_too_large": "images of too many pixels (left out)",
    "undecodable_image": "image files that cannot be decoded (left out)",
    "not_utf8": "texts or lines that are not UTF-8 (left out)",
    "missing_field": "without one of the fields (left out)",
    "not_a_text": "with a field that is no text (left out)",
    "not_a_number": "with a field that is no number (left out)",
    "empty_text": "empty texts (left out)",
    "carriage_returns": "with CRLF or CR line ends (made LF)",
    "duplicate_text": "that repeat an earlier one (left out)",
    "image_mark": "with an image mark, but no image (left out)",
    "prompts too long": "prompts too long (left out)",
    "responses too long": "responses too long (left out)",
    "not_in_vocabulary": "that the tokenizer does not give back, as it lacks characters (left out)",
    "special_token": "with a special token of the tokenizer in the prompt (left out)",
    "broken_smiles": "SMILES with a bracket, branch or ring left open (left out)",
    "broken_row": "rows of a table that cannot be read (left out)",
    "class_1": "of them of class 1",
    "tokens_left": "tokens at the end that fill no row (left out)",
}
LONGER = "; to keep them raise prepare.response_length, and data.response_length with it"
ADVICE = {
    "captions too long": LONGER,
    "responses too long": LONGER,
    "prompts too long": "; to keep them raise prepare.max_prompt",
}


class Counts(Counter[str]):
    """How often each thing happened. `examples`: the first name noted with it."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}

    def note(self, reason: str, example: str) -> None:
        """Count, and keep the first example."""
        self[reason] += 1
        self.examples.setdefault(reason, example)


def table(counts: Mapping[str, Mapping[str, int]], examples: Mapping[str, Mapping[str, str]]) -> str:
    """A line for each part and reason: part, number, meaning, and an example where there is one.

    What was written comes first in a part, even if it is nothing.
    """
    sort = lambda some: sorted(some.items(), key=lambda row: row[0] != "written")  # noqa: E731
    rows = [(part, *row) for part, some in counts.items() for row in sort(some) if row[1] or row[0] == "written"]
    wide = max((len(part) for part, _, _ in rows), default=0)
    digits = max((len(str(number)) for _, _, number in rows), default=0)
    lines = []
    for part, reason, number in rows:
        example = examples.get(part, {}).get(reason)
        such = f", such as {example}" if example else ""
        lines.append(f"{part:{wide}}  {number:>{digits}}  {MEANING.get(reason, reason)}{such}{ADVICE.get(reason, '')}")
    return "\n".join(lines)
