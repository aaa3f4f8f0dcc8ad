"""Read annotation files of many formats as entries: an image name with its captions.

    read_entries(path, counts) -> Entry, Entry, ...      skipped records are counted by reason

    file -> values (JSON, JSONL, concatenated objects, CSV, TSV) -> records -> the reader for their keys

    ViCrit        original_caption, changed_caption, solution_original, solution_target
    ReDiff        conversations or messages (the answer has errors), revise [{org, target}]
    conversations conversations or messages (LLaVA, ShareGPT4V, InternLM, LLaMA-Factory): the first answer
    captions      an image and a caption, text, output, or a list of captions (also COCO's own JSON)

The format is detected from the keys of each record, never from the file name.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.io.errors import UserError

IMAGE_KEYS = ("image", "images", "image_path", "image_file", "file_name", "filename", "img", "image_id")
CAPTION_KEYS = ("captions", "caption", "text", "output", "description")
PROMPT_KEYS = ("prompt", "problem", "instruction", "question")
TURN_KEYS = ("conversations", "messages")
HUMAN, ASSISTANT = {"human", "user"}, {"gpt", "bot", "assistant", "model"}
IMAGE_MARK = re.compile(r"<image>|<ImageHere>", re.IGNORECASE)
IMAGE_NAME = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)


@dataclass(frozen=True)
class RawSwap:
    """`text[start : start + len(right)] == right`; replacing it by `wrong` makes the caption false."""

    start: int
    right: str
    wrong: str


@dataclass
class Caption:
    """A true text with swaps that make it false."""

    text: str
    swaps: list[RawSwap] = field(default_factory=list)


@dataclass
class Entry:
    """The captions of one image in one record. `image` is the name as the record spells it."""

    image: str
    captions: list[Caption]
    prompt: str | None = None
    split: str | None = None


class Skip(Exception):
    """Raised for an unusable record; the message is the reason, as counted in index.json."""


def read_entries(path: Path, counts: Counter[str]) -> Iterator[Entry]:
    """Yield the usable records of an annotation file. Raises UserError if no record has a known format."""
    num_recognized, unrecognized = 0, None
    seen: set[str] = set()
    for record in _records(path, counts):
        counts["records"] += 1
        reader = _reader(record)
        if reader is None:
            unrecognized = unrecognized or record
            counts["unknown_format"] += 1
            continue
        num_recognized += 1
        name = str(record.get("id", f"#{counts['records']}"))
        counts["duplicate_id"] += name in seen
        seen.add(name)
        try:
            yield reader(record, counts)
        except Skip as reason:
            counts[str(reason)] += 1
    if not num_recognized:
        keys = ", ".join(map(str, unrecognized or ()))
        problem = f"the first record has the keys {keys}" if unrecognized else "it holds no records"
        raise UserError(
            f"{path} has no known annotation format: {problem}. "
            f"A record needs an image (one of {', '.join(IMAGE_KEYS)}) and a caption ({', '.join(CAPTION_KEYS)}), "
            f"{' or '.join(TURN_KEYS)}, or original_caption and changed_caption; "
            "`python -m src.prepare --help` shows every format"
        )


# --- files to records --------------------------------------------------------------------------------


def _records(path: Path, counts: Counter[str]) -> Iterator[dict]:
    if not path.is_file():
        raise UserError(f"no annotation file {path}; check prepare.annotations")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix.lower() in (".csv", ".tsv"):
        values: Iterable[Any] = _table(path, text)
    else:
        values = _json_values(path, text, counts)
    for value in values:
        if isinstance(value, dict):
            yield value
        else:
            counts["not_a_record"] += 1


def _table(path: Path, text: str) -> list[dict]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as a table: {error}") from error


def _json_values(path: Path, text: str, counts: Counter[str]) -> Iterator[Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{path} is not valid JSON: {error}") from error
        yield from _concatenated_json(text, counts)
        return
    yield from content if isinstance(content, list) else _records_of_object(content)


def _concatenated_json(text: str, counts: Counter[str]) -> Iterator[Any]:
    """Whitespace-separated JSON values: JSONL or pretty-printed objects. Broken lines are counted."""
    decoder, position = json.JSONDecoder(), 0
    while match := re.compile(r"\S").search(text, position):
        try:
            value, position = decoder.raw_decode(text, match.start())
            yield value
        except json.JSONDecodeError:
            counts["broken_json"] += 1
            end = text.find("\n", match.start())
            position = len(text) if end < 0 else end


def _records_of_object(value: Any) -> Iterator[Any]:
    """The records in a top-level JSON value: COCO's tables, a record, {file name: caption(s)} or {id: record}."""
    if not isinstance(value, dict):
        yield value
    elif isinstance(value.get("images"), list) and isinstance(value.get("annotations"), list):
        names = {image.get("id"): image.get("file_name") for image in value["images"]}
        yield from ({**row, "image": names.get(row.get("image_id"))} for row in value["annotations"])
    elif _reader(value) or not value:
        yield value
    elif all(isinstance(item, dict) for item in value.values()):
        yield from ({"id": name, **item} for name, item in value.items())
    elif all(IMAGE_NAME.search(name) for name in value):
        yield from ({"image": name, "captions": item} for name, item in value.items())
    else:
        yield value


# --- records to entries ------------------------------------------------------------------------------


def _reader(record: dict) -> Callable[[dict, Counter[str]], Entry] | None:
    if {"original_caption", "changed_caption"} <= record.keys():
        return _vicrit
    if any(key in record for key in TURN_KEYS):
        return _rediff if "revise" in record else _conversation
    has_image = any(key in record for key in IMAGE_KEYS)
    return _captions if has_image and _caption_key(record) else None


def _caption_key(record: dict) -> str | None:
    """The key of the caption. `text` is not a caption where it is a benchmark's question."""
    is_question = "label" in record or ("question_id" in record and "prompt" not in record)
    return next((key for key in CAPTION_KEYS if key in record and not (key == "text" and is_question)), None)


def _captions(record: dict, counts: Counter[str]) -> Entry:
    value = record[_caption_key(record) or "caption"]
    texts = value if isinstance(value, list) else [value]
    captions = []
    for text in texts:
        if isinstance(text, str) and text.strip():
            captions.append(Caption(text.strip()))
        else:
            counts["empty_caption"] += bool(len(texts) > 1)
    if not captions:
        raise Skip("empty_caption")
    return _entry(record, captions, next((record[key] for key in PROMPT_KEYS if key in record), None))


def _vicrit(record: dict, counts: Counter[str]) -> Entry:
    caption = Caption(_text(record["original_caption"]))
    right, wrong = record.get("solution_original"), record.get("solution_target")
    start = _swap_start(caption.text, str(record["changed_caption"]), right, wrong)
    if start is None:
        counts["swap_not_found"] += bool(right or wrong)
    else:
        caption.swaps.append(RawSwap(start, str(right), str(wrong)))
    return _entry(record, [caption], record.get("problem"))


def _swap_start(true: str, false: str, right: Any, wrong: Any) -> int | None:
    """Where replacing `right` by `wrong` turns the true caption into the false one, up to case and whitespace."""
    if not (isinstance(right, str) and isinstance(wrong, str) and right and wrong):
        return None
    normalize = lambda text: " ".join(text.casefold().split())  # noqa: E731
    starts = [match.start() for match in re.finditer(f"(?={re.escape(right)})", true)]
    return next((s for s in starts if normalize(true[:s] + wrong + true[s + len(right) :]) == normalize(false)), None)


def _conversation(record: dict, counts: Counter[str]) -> Entry:
    prompt, answer = _first_turns(record, counts)
    return _entry(record, [Caption(_text(answer))], prompt)


def _rediff(record: dict, counts: Counter[str]) -> Entry:
    prompt, answer = _first_turns(record, counts)
    return _entry(record, [_corrected(_text(answer), record["revise"])], prompt)


def _corrected(draft: str, edits: Any) -> Caption:
    """The draft with all edits applied, and its errors as swaps. Raises Skip if an edit does not apply."""
    spans: list[tuple[int, str, str]] = []
    for edit in edits if isinstance(edits, list) else []:
        org, target = (edit.get("org"), edit.get("target")) if isinstance(edit, dict) else (None, None)
        if not (isinstance(org, str) and isinstance(target, str) and org and target):
            raise Skip("revise_empty_span")
        spans.append((_find(draft, org), org, target))
    text, end, swaps = "", 0, []
    for start, org, target in sorted(spans):
        if start < end:
            raise Skip("revise_overlap")
        text += draft[end:start]
        swaps.append(RawSwap(len(text), target, org))
        text, end = text + target, start + len(org)
    return Caption(text + draft[end:], swaps)


def _find(text: str, span: str) -> int:
    """The start of the only occurrence of a span; occurrences as whole words take precedence."""
    starts = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(span)}(?!\w)", text)]
    starts = starts or [m.start() for m in re.finditer(re.escape(span), text)]
    if len(starts) != 1:
        raise Skip("revise_ambiguous" if starts else "revise_not_found")
    return starts[0]


def _first_turns(record: dict, counts: Counter[str]) -> tuple[str, Any]:
    """The first question and its answer."""
    turns = next((record[key] for key in TURN_KEYS if record.get(key)), [])
    turns = [_turn(turn) for turn in turns] if isinstance(turns, list) else []
    questions = [text for role, text in turns if role in HUMAN]
    answers = [text for role, text in turns if role in ASSISTANT]
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


def _turn(turn: Any) -> tuple[str, Any]:
    if not isinstance(turn, dict):
        return "", ""
    return str(turn.get("from", turn.get("role", ""))).lower(), turn.get("value", turn.get("content"))


def _entry(record: dict, captions: list[Caption], prompt: Any) -> Entry:
    split = record.get("split")
    question = " ".join(IMAGE_MARK.sub(" ", prompt).split()) if isinstance(prompt, str) else ""
    return Entry(_image(record), captions, question or None, split if isinstance(split, str) else None)


def _image(record: dict) -> str:
    """The name of the record's only image. Raises Skip if it has none or several."""
    value = next((record[key] for key in IMAGE_KEYS if record.get(key) not in (None, "", [])), None)
    names = {str(name) for name in value} if isinstance(value, list) else {str(value)}
    if value is None or isinstance(value, bool | float | dict):
        raise Skip("no_image")
    if len(names) > 1:
        raise Skip("several_images")
    return names.pop()


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Skip("empty_caption")
    return value.strip()
