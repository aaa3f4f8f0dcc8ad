"""ViCrit: {"image", "problem", "original_caption", "changed_caption", "solution_original", "solution_target"}."""

from __future__ import annotations

import re
from typing import Any

from src.preparation.counts import Counts
from src.preparation.sources.base import Caption, caption_text
from src.scenes.grammar import Swap


def matches(record: dict) -> bool:
    return None not in (record.get("original_caption"), record.get("changed_caption"))


def parse(record: dict, place: str, counts: Counts) -> tuple[list[Caption], Any]:
    """The true caption. Its swap starts where it gives the false caption, up to case and white space."""
    text, false = caption_text(record["original_caption"]), str(record["changed_caption"])
    right, wrong = record.get("solution_original"), record.get("solution_target")
    if isinstance(right, str) and isinstance(wrong, str) and right and wrong:
        normalize = lambda text: " ".join(text.casefold().split())  # noqa: E731
        for match in re.finditer(f"(?={re.escape(right)})", text):
            start, end = match.start(), match.start() + len(right)
            if normalize(text[:start] + wrong + text[end:]) == normalize(false):
                return [Caption(text, [Swap(start, end, right, wrong, "phrase")])], record.get("problem")
    counts.skip("swap_not_found", place)
    return [Caption(text)], record.get("problem")
