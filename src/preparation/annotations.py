"""Captions of images in the records of annotation files. The keys of a record tell its format:

ViCrit        original_caption, changed_caption, solution_original, solution_target
ReDiff        conversations or messages (the answer has errors), revise [{org, target}]
conversations conversations or messages (LLaVA, ShareGPT4V, InternLM, LLaMA-Factory): the first answer
captions      an image and a caption, text, output, or a list of captions (also COCO's own JSON)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.io.errors import UserError
from src.preparation.counts import Counts, Skip
from src.preparation.records import check_unicode, read_records
from src.scenes.grammar import Swap

IMAGE_KEYS = ("image", "images", "image_path", "image_file", "file_name", "filename", "img", "image_id")
CAPTION_KEYS = ("captions", "caption", "text", "output", "description")
PROMPT_KEYS = ("prompt", "problem", "instruction", "question")
TURN_KEYS = ("conversations", "messages")
HUMAN, ASSISTANT = {"human", "user"}, {"gpt", "bot", "assistant", "model"}
IMAGE_MARK = re.compile(r"<image>|<ImageHere>", re.IGNORECASE)


@dataclass
class Caption:
    """A true text with swaps that make it false."""

    text: str
    swaps: list[Swap] = field(default_factory=list)


@dataclass
class Entry:
    """The captions of one image in one record. `image` is the name as the record spells it."""

    image: str
    captions: list[Caption]
    prompt: str | None
    split: str | None


def read_entries(path: Path, counts: Counts) -> Iterator[Entry]:
    """Yield the usable records of an annotation file. Raises UserError if no record has a known format."""
    keys, is_known = "", False
    for place, record in read_records(path, counts):
        keys = keys or ", ".join(map(str, list(record)[:12]))
        try:
            entry = to_entry(record, place, counts)
        except Skip as reason:
            counts.skip(reason, place)
            is_known |= str(reason) != "unknown_format"
        else:
            is_known = True
            yield entry
    if not is_known:
        raise UserError(
            f"{path} has no known annotation format: "
            f"{f'the first record has the keys {keys}' if keys else 'it holds no records'}. "
            f"A record needs an image (one of {', '.join(IMAGE_KEYS)}) and a caption ({', '.join(CAPTION_KEYS)}), "
            f"{' or '.join(TURN_KEYS)}, or original_caption and changed_caption; "
            "`python -m src.prepare --help` shows every format"
        )


def to_entry(record: dict, place: str, counts: Counts) -> Entry:
    """The entry of one record. Raises Skip if it is unusable."""
    # 1. its captions and its question, by format; `text` is not a caption where it is a benchmark's question
    is_question = "label" in record or ("question_id" in record and "prompt" not in record)
    caption_key = next((key for key in CAPTION_KEYS if key in record and not (key == "text" and is_question)), None)
    if {"original_caption", "changed_caption"} <= record.keys():
        captions, prompt = [_vicrit(record, counts)], record.get("problem")
    elif any(key in record for key in TURN_KEYS):
        prompt, answer = _first_turns(record, counts)
        text = _text(answer)
        captions = [_corrected(text, record["revise"]) if "revise" in record else Caption(text)]
    elif caption_key and any(key in record for key in IMAGE_KEYS):
        prompt, captions = next((record[key] for key in PROMPT_KEYS if key in record), None), []
        value = record[caption_key]
        texts = value if isinstance(value, list) and value else [value]
        for text in texts:
            try:
                captions.append(Caption(_text(text)))
            except Skip as reason:
                if len(texts) == 1:
                    raise
                counts.skip(reason, place)
        if not captions:
            raise Skip("empty_caption")
    else:
        raise Skip("unknown_format")
    question = " ".join(IMAGE_MARK.sub(" ", prompt).split()) if isinstance(prompt, str) else ""
    check_unicode(question + "".join(swap.wrong for caption in captions for swap in caption.swaps))
    # 2. its only image
    image = next((record[key] for key in IMAGE_KEYS if record.get(key) not in (None, "", [])), None)
    if image is None or isinstance(image, bool | float | dict):
        raise Skip("no_image")
    names = {str(name) for name in image} if isinstance(image, list) else {str(image)}
    if len(names) > 1:
        raise Skip("several_images")
    split = record.get("split")
    return Entry(names.pop(), captions, question or None, split if isinstance(split, str) else None)


def _vicrit(record: dict, counts: Counts) -> Caption:
    """The true caption. Its swap starts where it gives the false caption, up to case and white space."""
    text, false = _text(record["original_caption"]), str(record["changed_caption"])
    right, wrong = record.get("solution_original"), record.get("solution_target")
    if not (isinstance(right, str) and isinstance(wrong, str) and right and wrong):
        counts["swap_not_found"] += bool(right or wrong)
        return Caption(text)
    normalize = lambda text: " ".join(text.casefold().split())  # noqa: E731
    for match in re.finditer(f"(?={re.escape(right)})", text):
        start, end = match.start(), match.start() + len(right)
        if normalize(text[:start] + wrong + text[end:]) == normalize(false):
            return Caption(text, [Swap(start, end, right, wrong, "phrase")])
    counts["swap_not_found"] += 1
    return Caption(text)


def _corrected(draft: str, edits: Any) -> Caption:
    """The draft with all edits applied, and its errors as swaps. Raises Skip if an edit does not apply."""
    spans: list[tuple[int, str, str]] = []
    for edit in edits if isinstance(edits, list) else []:
        org, target = (edit.get("org"), edit.get("target")) if isinstance(edit, dict) else (None, None)
        if not (isinstance(org, str) and isinstance(target, str) and org and target):
            raise Skip("revise_empty_span")
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


def _first_turns(record: dict, counts: Counts) -> tuple[str, Any]:
    """The first question and its answer."""
    turns = next((record[key] for key in TURN_KEYS if record.get(key)), None)
    questions, answers = [], []
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict):
            role = str(turn.get("from", turn.get("role", ""))).lower()
            text = turn.get("value", turn.get("content"))
            questions += [text] if role in HUMAN else []
            answers += [text] if role in ASSISTANT else []
    if not answers:
        raise Skip("no_answer")
    counts["later_turns"] += len(answers) - 1
    marks = [len(IMAGE_MARK.findall(text)) for text in questions if isinstance(text, str)]
    if marks and marks[0] > 1:
        raise Skip("several_images")
    if "video" in record:
        raise Skip("video")
    if sum(marks) and not marks[0]:
        raise Skip("image_in_later_turn")
    return (questions[0] if questions else ""), answers[0]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Skip("empty_caption")
    check_unicode(value)
    return value.strip()
