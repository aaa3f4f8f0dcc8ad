"""Annotation files of many formats to entries: an image name with its captions.

    read_entries(path, counts) -> Entry, Entry, ...      `counts` gets what was skipped, by reason

    file -> values (JSON, JSONL, objects one after another, CSV, TSV) -> records -> the reader for their keys

    ViCrit        original_caption, changed_caption, solution_original, solution_target
    ReDiff        conversations or messages (the answer is flawed), revise [{org, target}]
    conversations conversations or messages (LLaVA, ShareGPT4V, InternLM, LLaMA-Factory): the first answer
    captions      an image and a caption, a text, an output or a list of captions (also COCO's own JSON)

The format is told from the keys of each record, never from the name of the file.
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
    """`text[start : start + len(right)] == right`; `wrong` in its place makes the caption false."""

    start: int
    right: str
    wrong: str


@dataclass
class Caption:
    """A true text and known ways to make it false."""

    text: str
    swaps: list[RawSwap] = field(default_factory=list)


@dataclass
class Entry:
    """What one record says about one image, whose name is as written there."""

    image: str
    captions: list[Caption]
    prompt: str | None = None
    split: str | None = None


class Skip(Exception):
    """A record that cannot be used; the message is the reason."""


def read_entries(path: Path, counts: Counter[str]) -> Iterator[Entry]:
    """The usable records of an annotation file. Raises UserError where no record has a known format."""
    fitting, odd = 0, None
    seen: set[str] = set()
    for record in _records(path, counts):
        counts["records"] += 1
        reader = _reader(record)
        if reader is None:
            odd = odd or record
            counts["unknown_format"] += 1
            continue
        fitting += 1
        name = str(record.get("id", f"#{counts['records']}"))
        counts["duplicate_id"] += name in seen
        seen.add(name)
        try:
            yield reader(record, counts)
        except Skip as reason:
            counts[str(reason)] += 1
    if not fitting:
        keys = f"the first record has the keys {', '.join(map(str, odd))}" if odd else "it holds no records"
        raise UserError(
            f"{path} has no known annotation format: {keys}. A record needs an image (one of {', '.join(IMAGE_KEYS)}) "
            f"and a caption ({', '.join(CAPTION_KEYS)}), {' or '.join(TURN_KEYS)}, or original_caption and "
            "changed_caption; `python -m src.prepare --help` shows each"
        )


# --- files to records --------------------------------------------------------------------------------


def _records(path: Path, counts: Counter[str]) -> Iterator[dict]:
    if not path.is_file():
        raise UserError(f"no annotation file {path}")
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
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{path} is not valid JSON: {error}") from error
        yield from _one_after_another(text, counts)
        return
    yield from whole if isinstance(whole, list) else _of_mapping(whole)


def _one_after_another(text: str, counts: Counter[str]) -> Iterator[Any]:
    """JSON values with blanks between them: JSONL, pretty-printed objects. Broken lines are counted."""
    decoder, place = json.JSONDecoder(), 0
    while match := re.compile(r"\S").search(text, place):
        try:
            value, place = decoder.raw_decode(text, match.start())
            yield value
        except json.JSONDecodeError:
            counts["broken_json"] += 1
            end = text.find("\n", match.start())
            place = len(text) if end < 0 else end


def _of_mapping(value: Any) -> Iterator[Any]:
    """The records in a top-level object: COCO's tables, a record, {file name: caption(s)} or {id: record}."""
    if not isinstance(value, dict):
        yield value
    elif isinstance(value.get("images"), list) and isinstance(value.get("annotations"), list):
        names = {image.get("id"): image.get("file_name") for image in value["images"]}
        yield from ({**note, "image": names.get(note.get("image_id"))} for note in value["annotations"])
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
    """Where the caption is. The `text` of a benchmark's question or of its label is none."""
    question = "label" in record or ("question_id" in record and "prompt" not in record)
    return next((key for key in CAPTION_KEYS if key in record and not (key == "text" and question)), None)


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
    start = _changed_at(caption.text, str(record["changed_caption"]), right, wrong)
    if start is None:
        counts["swap_not_found"] += bool(right or wrong)
    else:
        caption.swaps.append(RawSwap(start, str(right), str(wrong)))
    return _entry(record, [caption], record.get("problem"))


def _changed_at(true: str, false: str, right: Any, wrong: Any) -> int | None:
    """Where `right` becomes `wrong` as the true caption turns false, capitals and blanks aside."""
    if not (isinstance(right, str) and isinstance(wrong, str) and right and wrong):
        return None
    same = lambda text: " ".join(text.casefold().split())  # noqa: E731
    places = [match.start() for match in re.finditer(f"(?={re.escape(right)})", true)]
    return next((p for p in places if same(true[:p] + wrong + true[p + len(right) :]) == same(false)), None)


def _conversation(record: dict, counts: Counter[str]) -> Entry:
    prompt, answer = _first_turns(record, counts)
    return _entry(record, [Caption(_text(answer))], prompt)


def _rediff(record: dict, counts: Counter[str]) -> Entry:
    prompt, answer = _first_turns(record, counts)
    return _entry(record, [_repaired(_text(answer), record["revise"])], prompt)


def _repaired(flawed: str, pairs: Any) -> Caption:
    """The true text behind a flawed one, with its flaws as swaps; every flaw has to be found."""
    found: list[tuple[int, str, str]] = []
    for pair in pairs if isinstance(pairs, list) else []:
        org, target = (pair.get("org"), pair.get("target")) if isinstance(pair, dict) else (None, None)
        if not (isinstance(org, str) and isinstance(target, str) and org and target):
            raise Skip("revise_empty_span")
        found.append((_find(flawed, org), org, target))
    text, end, swaps = "", 0, []
    for start, org, target in sorted(found):
        if start < end:
            raise Skip("revise_overlap")
        text += flawed[end:start]
        swaps.append(RawSwap(len(text), target, org))
        text, end = text + target, start + len(org)
    return Caption(text + flawed[end:], swaps)


def _find(text: str, part: str) -> int:
    """The only place of a part; whole words go before parts of words."""
    places = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(part)}(?!\w)", text)]
    places = places or [m.start() for m in re.finditer(re.escape(part), text)]
    if len(places) != 1:
        raise Skip("revise_ambiguous" if places else "revise_not_found")
    return places[0]


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
    clean = " ".join(IMAGE_MARK.sub(" ", prompt).split()) if isinstance(prompt, str) else ""
    return Entry(_image(record), captions, clean or None, split if isinstance(split, str) else None)


def _image(record: dict) -> str:
    """The name of the record's only image."""
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
