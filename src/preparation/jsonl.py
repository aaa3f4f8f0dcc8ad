"""Read text files as records or documents. Unreadable lines are left out and counted, with file and line.

    read_records(Path("gsm8k.jsonl"), counts)            ("gsm8k.jsonl:17", {"question": ..., "answer": ...}), ...
    read_documents(Path("book.txt"), "text", counts)     ("book.txt#1", "It was ..."), ...
    text_of(record, "question")                          the text of a field; raises `Skip` with the reason

.jsonl: one object per line; .json: a list of objects; .csv and .tsv: a table whose first line names the columns. A .txt
file is one document, or several separated by <|endoftext|>; in the other formats, a document is one field of a record.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.io.errors import UserError
from src.preparation.annotations import Skip
from src.preparation.counts import Counts

SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")


def read_records(path: Path, counts: Counts) -> Iterator[tuple[str, dict]]:
    """Yield (place, record). Raises UserError if the file is missing or has another suffix."""
    _check(path)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        values: Iterator[tuple[str, Any]] = _table(path, counts, delimiter="\t" if suffix == ".tsv" else ",")
    elif suffix == ".json":
        values = _json(path)
    elif suffix == ".jsonl":
        values = _json_lines(path, counts)
    else:
        raise UserError(f"{path} has no records; records are read from {', '.join(SUFFIXES[1:])} files")
    for place, value in values:
        counts["records"] += 1
        if isinstance(value, dict):
            yield place, value
        else:
            counts.note("not_a_record", place)


def read_documents(path: Path, field: str, counts: Counts) -> Iterator[tuple[str, str]]:
    """Yield (place, text). `field`: the field of a record that holds the text, for files other than .txt."""
    if path.suffix.lower() != ".txt":
        for place, record in read_records(path, counts):
            try:
                yield place, text_of(record, field)
            except Skip as reason:
                count_skipped(counts, reason, place, record)
        return
    _check(path)
    text = normalize_newlines("".join(line for _, line in _lines(path, counts)))
    documents = [document.strip() for document in text.split(SEPARATOR)]
    for number, document in enumerate(documents, start=1):
        if document:
            counts["records"] += 1
            yield f"{path.name}#{number}", document
        elif number < len(documents):  # a separator may end the file
            counts.note("empty_text", f"{path.name}#{number}")


def text_of(record: dict, field: str) -> str:
    """The text of a field, with LF line ends. Raises `Skip` if it is missing, empty or not text."""
    value = record.get(field)
    if value is None:
        raise Skip("missing_field")
    if not isinstance(value, str):
        raise Skip("not_a_text")
    if not value.strip():
        raise Skip("empty_text")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate: valid in JSON, but not encodable as UTF-8
        raise Skip("not_utf8") from None
    return normalize_newlines(value)


def normalize_newlines(text: str) -> str:
    """Replace CRLF and CR line ends by LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def count_skipped(counts: Counts, reason: Skip, place: str, record: dict) -> None:
    """Count a skipped record. For a missing field, the example lists the record's fields, to show a misspelling."""
    fields = ", ".join(str(name) for name in record if name is not None)
    suffix = f" (its fields: {fields[:80]})" if str(reason) == "missing_field" else ""
    counts.note(str(reason), place + suffix)


def _check(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"no file {path}")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: texts are read from {', '.join(SUFFIXES)} files")


def _lines(path: Path, counts: Counts) -> Iterator[tuple[int, str]]:
    """Yield (number, line with its line end); lines that are not UTF-8 are counted and left out."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                counts.note("not_utf8", f"{path.name}:{number}")


def _json_lines(path: Path, counts: Counts) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path, counts):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            counts.note("broken_json", f"{path.name}:{number}")
            continue
        yield f"{path.name}:{number}", value


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, list):
        raise UserError(f"{path} must hold a list of objects; name a file with one object per line .jsonl")
    yield from ((f"{path.name}#{number}", value) for number, value in enumerate(values, start=1))


def _table(path: Path, counts: Counts, *, delimiter: str) -> Iterator[tuple[str, Any]]:
    place = f"{path.name}:1"

    def lines() -> Iterator[str]:
        nonlocal place
        for number, line in _lines(path, counts):
            place = f"{path.name}:{number}"
            yield line

    rows = csv.DictReader(lines(), delimiter=delimiter)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            counts.note("broken_row", place)
            continue
        yield place, row
