"""The captions, the question and the image of one record. The keys of a record tell its format.

ViCrit      {"problem", "original_caption", "changed_caption", "solution_original", "solution_target"}
ReDiff      a conversation, or a record with one caption, whose text has errors, and {"revise": [{"org", "target"}]}
LLaVA, ...  {"conversations": [{"from", "value"}]}, {"messages": [{"role", "content"}]}: the first question and answer
plain       a caption, or a list of captions, under any of `CAPTION_KEYS`
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from src.preparation.counts import Counts, Skip
from src.preparation.records import NAN, check_turns, clean, with_input
from src.preparation.tables import IMAGE_FILE
from src.scenes.grammar import Swap

IMAGE_KEYS = ("image", "images", "image_path", "image_file", "image_name", "file_name", "filename", "img", "image_id")
BYTES_KEYS = ("binary", "image_bytes", "image_base64")
CAPTION_KEYS = ("captions", "caption", "sentences", "text", "output", "description", "comment")
ANSWER_KEYS = ("answer", "answers")  # of a question, which may stand under a key of captions
PROMPT_KEYS = ("prompt", "problem", "instruction", "question")
TURN_KEYS = ("conversations", "messages")
IMAGE_MARK = re.compile(r"\s*(?:<image>|<ImageHere>)\s*", re.IGNORECASE)
LONG = 1000  # characters: a longer name of an image is the image, as base64
ROLES = {
    **dict.fromkeys(("human", "user"), "question"),
    **dict.fromkeys(("gpt", "bot", "assistant", "model"), "answer"),
    "system": "system",
}
EMPTY = {*NAN, "", "none", "null", "n/a"}  # written into a table for no value
PRINTED = re.compile(r"\s*([\[{]|\(['\"]|array\().*[]})]\s*", re.DOTALL)


@dataclass
class Caption:
    """A true text with swaps that make it false."""

    text: str
    swaps: list[Swap] = field(default_factory=list)


@dataclass
class Entry:
    """The captions of one image in one record. image: its name as the record spells it; data: of an image file."""

    image: str
    captions: list[Caption]
    prompt: str | None
    split: str | None
    place: str
    data: bytes | None = None


def read_captions(record: dict, place: str, counts: Counts) -> tuple[list[Caption], Any]:
    """The captions and the question, which may be missing. Raises Skip if the record cannot be used."""
    is_talk = any(record.get(key) is not None for key in TURN_KEYS)
    if None not in (record.get("original_caption"), record.get("changed_caption")):
        return [_changed(record, place, counts)], record.get("problem")
    if not is_talk and (caption_key(record) is None or not (has_image(record) or "revise" in record)):
        raise Skip("unknown_format")
    texts, question = _first_turns(record, place, counts) if is_talk else _plain(record)
    if "revise" not in record:
        return [Caption(text) for text in texts], question
    if len(texts) > 1:
        raise Skip("revise_of_several_captions")
    return [_corrected(texts[0], record["revise"])], question


def caption_key(record: dict) -> str | None:
    """The key of the captions: the first that is not null. A record with an answer has none: what it asks, and hints
    for it, stand under such keys. Nor is `text` one where it is the question of a benchmark, or Alpaca's template."""
    if any(record.get(key) not in (None, "", []) for key in ANSWER_KEYS):
        return None
    is_question = record.get("label") is not None or ("question_id" in record and "prompt" not in record)
    is_other = is_question or {"instruction", "output"} <= record.keys()
    keys = [key for key in CAPTION_KEYS if key in record and not (key == "text" and is_other)]
    return next((key for key in keys if record[key] is not None), keys[0] if keys else None)


def _plain(record: dict) -> tuple[list[str], Any]:
    is_empty = lambda value: value is None or str(value).strip().lower() in EMPTY  # noqa: E731
    values = [value for value in _flatten(record[caption_key(record) or ""]) if not is_empty(value)]
    if not values:
        raise Skip("empty_caption")
    key = next((key for key in PROMPT_KEYS if not is_empty(record.get(key))), None)
    question = record[key] if key else None
    if key == "instruction" and isinstance(question, str):
        check_turns(record)
        question = with_input(question, record)
    return [caption_text(value) for value in values], question


def _flatten(value: Any) -> Iterator[Any]:
    """The captions in nested lists, in records, or in a list that a cell of a table holds as text.

    Raises Skip for a printed list that cannot be read, such as one of NumPy: ['A cat.' 'A dog.'].
    """
    if isinstance(value, str) and PRINTED.fullmatch(value):
        value = _listed(value.strip())
    if isinstance(value, dict):
        value = next((value[key] for key in ("raw", *CAPTION_KEYS) if key in value), value)
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flatten(item)
    else:
        yield value


def _listed(text: str) -> Any:
    """The value of a list or mapping in JSON, or as Python prints it."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = read(text)
            if read is json.loads or repr(value) == text:  # Python joins strings without a comma between them
                return value
    raise Skip("unreadable_list")


def _first_turns(record: dict, place: str, counts: Counts) -> tuple[list[str], Any]:
    """The first answer and its question, "" if there is none. Raises Skip for a system text, as it would be lost."""
    turns = next((record[key] for key in TURN_KEYS if record.get(key)), None)
    turns = [turn if isinstance(turn, dict) else {} for turn in (turns if isinstance(turns, list) else [])]
    roles = [ROLES.get(str(turn.get("from", turn.get("role"))).lower(), "unknown") for turn in turns]
    texts = [_joined(turn.get("value", turn.get("content"))) for turn in turns]
    systems = [text for role, text in zip(roles, texts, strict=True) if role == "system"]
    if any((*systems, record.get("system"), record.get("system_prompt"))):
        raise Skip("system_text")
    texts = [text for role, text in zip(roles, texts, strict=True) if role != "system"]
    roles = [role for role in roles if role != "system"]
    if "answer" not in roles:
        raise Skip("no_answer")
    if record.get("video") is not None:
        raise Skip("video")
    if roles[:2] != ["question", "answer"] and roles != ["answer"]:
        raise Skip("turns_out_of_order")
    marks = [isinstance(text, str) and bool(IMAGE_MARK.search(text)) for text in texts]
    if roles[0] == "question" and any(marks[2:]) and not marks[0]:
        raise Skip("image_in_later_turn")
    for _ in range(roles.count("answer") - 1):
        counts.skip("later_turns", place)
    question, answer = (texts[0] or "", texts[1]) if len(texts) > 1 else ("", texts[0])
    return [caption_text(answer)], question


def _joined(content: Any) -> Any:
    """The text of a turn; one in parts is joined, with the mark of an image for each image."""
    if not isinstance(content, list):
        return content
    parts = (part if isinstance(part, dict) else {"text": part} for part in content)
    is_image = lambda part: str(part.get("type")).startswith("image")  # noqa: E731
    return "".join("<image>" if is_image(part) else str(part.get("text") or "") for part in parts)


def _corrected(draft: str, edits: Any) -> Caption:
    """The draft with all edits applied, and its errors as swaps. Raises Skip if an edit does not apply."""
    if isinstance(edits, str):
        with suppress(ValueError):
            edits = json.loads(edits)
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


def _changed(record: dict, place: str, counts: Counts) -> Caption:
    """ViCrit's true caption. Its swap starts where it gives the false caption, up to case and white space."""
    text, false = caption_text(record["original_caption"]), str(record["changed_caption"])
    right, wrong = record.get("solution_original"), record.get("solution_target")
    if isinstance(right, str) and isinstance(wrong, str) and right and wrong:
        normalize = lambda text: " ".join(text.casefold().split())  # noqa: E731
        for match in re.finditer(f"(?={re.escape(right)})", text):
            start, end = match.start(), match.start() + len(right)
            if normalize(text[:start] + wrong + text[end:]) == normalize(false):
                return Caption(text, [Swap(start, end, right, wrong, "phrase")])
    counts.skip("swap_not_found", place)
    return Caption(text)


def caption_text(value: Any) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Skip("empty_caption")
    if not isinstance(value, str):
        raise Skip("caption_not_text")
    return clean(value).strip()


def question_text(value: Any) -> str | None:
    """A question without the mark of its only image; its line ends stay. None for an empty one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise Skip("question_not_text")
    if len(IMAGE_MARK.findall(value)) > 1:
        raise Skip("several_images")
    return IMAGE_MARK.sub(lambda mark: "\n" if "\n" in mark[0] else " ", clean(value)).strip() or None


def has_image(record: Mapping[str, Any]) -> bool:
    """Whether some key is that of an image."""
    return any(key in record for key in (*IMAGE_KEYS, *BYTES_KEYS)) or bool(IMAGE_FILE.fullmatch(str(record.get("id"))))


def image_of(record: Mapping[str, Any]) -> tuple[str, bytes | None]:
    """(name, data of the image file) of the only image of a record; "" or None where it has none of these."""
    # 1. its name, which may come with the bytes
    value = next((record[key] for key in IMAGE_KEYS if record.get(key) not in (None, "", [])), None)
    if isinstance(value, list):
        if len({str(item) for item in value}) > 1:
            raise Skip("several_images")
        value = value[0]
    data = next((record[key] for key in BYTES_KEYS if isinstance(record.get(key), str | bytes)), None)
    if isinstance(value, dict):
        data, value = value.get("bytes") or data, value.get("path")
    elif isinstance(value, bytes) or (isinstance(value, str) and len(value) > LONG):
        data, value = value, next((record[key] for key in IMAGE_KEYS[2:] if record.get(key)), None)
    if value is None and isinstance(name := record.get("id"), str) and IMAGE_FILE.fullmatch(name):
        value = name
    # 2. both as they are used
    if isinstance(data, str):
        try:
            data = base64.b64decode(data.partition("base64,")[2] or data)
        except (ValueError, binascii.Error):
            raise Skip("broken_base64") from None
    if not isinstance(value, str | int) or isinstance(value, bool):
        value = None
    if (value is None and not data) or not isinstance(data, bytes | None):
        raise Skip("no_image")
    return clean(str(value if value is not None else "")).strip(), data or None
