"""Read record files of any kind: the one reader for annotations and texts.

    read_records(Path("gsm8k.jsonl"), counts)      ("gsm8k.jsonl:17", {"question": ..., "answer": ...}), ...

    .csv, .tsv   a table whose first line names the columns
    .txt         one document, or several separated by <|endoftext|>, as records {"text": document}
    .jsonl       JSON records one after another, in lines or over several lines
    any other    JSON: the same, a list of records, COCO's tables, {name: record}, or {file name: captions}

What cannot be read is counted and left out, with its file and line (`:17`) or number (`#17`) as the example.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.io.errors import UserError
from src.preparation.counts import Counts, Skip

SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file
FILE_NAME = re.compile(r"\.\w{2,5}$")
NOT_BLANK = re.compile(r"\S")


def read_records(path: Path, counts: Counts) -> Iterator[tuple[str, dict]]:
    """Yield (place, record). Raises UserError if the file is missing, or is a JSON list with a syntax error."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    readers = {".csv": _table, ".tsv": _table, ".txt": _documents, ".jsonl": _json_values}
    for place, value in readers.get(path.suffix.lower(), _json)(path, counts):
        counts["records"] += 1
        if isinstance(value, dict):
            yield place, value
        else:
            counts.skip("not_a_record", place)


def text_of(record: dict, field: str) -> str:
    """The text of a field, with LF line ends. Raises `Skip` if it is missing, empty or not text."""
    value = record.get(field)
    if value is None:
        names = ", ".join(str(name) for name in record if name is not None)
        raise Skip("missing_field", f" (its fields: {names[:80]})")  # shows a misspelling
    if not isinstance(value, str):
        raise Skip("not_a_text")
    if not value.strip():
        raise Skip("empty_text")
    check_unicode(value)
    return value.replace("\r\n", "\n").replace("\r", "\n")


def check_unicode(text: str) -> None:
    """Raise `Skip` for half of a surrogate pair, which is valid in JSON, but cannot be stored as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Skip("not_utf-8") from None


def _json(path: Path, counts: Counts) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            raise UserError(f"{path} is not valid JSON: {error}") from error
        yield from _json_values(path, counts)
        return
    records = content if isinstance(content, list) else [content]
    if isinstance(content, dict):
        images, annotations = content.get("images"), content.get("annotations")
        if isinstance(images, list) and isinstance(annotations, list):  # COCO
            names = {image.get("id"): image.get("file_name") for image in images}
            records = [{**row, "image": names.get(row.get("image_id"))} for row in annotations]
        elif all(isinstance(item, dict) for item in content.values()):
            records = [{"id": name, **item} for name, item in content.items()]
        elif all(FILE_NAME.search(name) for name in content):
            records = [{"image": name, "captions": item} for name, item in content.items()]
    for number, record in enumerate(records, start=1):
        yield f"{path.name}#{number}", record


def _json_values(path: Path, counts: Counts) -> Iterator[tuple[str, Any]]:
    """JSON values that white space separates. After a broken one, reading goes on in the next line."""
    lines = dict(_lines(path, counts))
    text = "".join(lines.get(number, "\n") for number in range(1, max(lines, default=0) + 1))
    decoder, number, start = json.JSONDecoder(), 1, 0
    while rest := NOT_BLANK.search(text, start):
        number += text.count("\n", start, rest.start())
        place = f"{path.name}:{number}"
        try:
            value, start = decoder.raw_decode(text, rest.start())
        except (ValueError, RecursionError):
            counts.skip("broken_json", place)
            newline = text.find("\n", rest.start())
            start = newline if newline >= 0 else len(text)
        else:
            yield place, value
        number += text.count("\n", rest.start(), start)


def _table(path: Path, counts: Counts) -> Iterator[tuple[str, dict]]:
    lines = dict(_lines(path, counts))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.DictReader(lines.values(), delimiter=delimiter, strict=True)
    numbers = list(lines)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:  # a field that is too long, or a quotation mark that is not closed
            row = {None: None}
        place = f"{path.name}:{numbers[rows.reader.line_num - 1]}"  # the last line of the row
        if None in row:  # more cells than columns, as with a comma that is not quoted
            counts.skip("broken_row", place)
        else:
            yield place, row


def _documents(path: Path, counts: Counts) -> Iterator[tuple[str, dict]]:
    documents = "".join(line for _, line in _lines(path, counts)).split(SEPARATOR)
    if len(documents) > 1 and not documents[-1].strip():  # a separator may end the file
        documents.pop()
    for number, document in enumerate(documents, start=1):
        yield f"{path.name}#{number}", {"text": document.strip()}


def _lines(path: Path, counts: Counts) -> Iterator[tuple[int, str]]:
    """Yield (number, line with its line end); lines that are not UTF-8 are counted and left out."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                counts.skip("not_utf-8", f"{path.name}:{number}")
