"""Files of texts to records and documents. What cannot be read is left out and counted, with its place.

    read_records(Path("gsm8k.jsonl"), counts)            ("gsm8k.jsonl:17", {"question": ..., "answer": ...}), ...
    read_documents(Path("book.txt"), "text", counts)     ("book.txt#1", "It was ..."), ...
    text_of(record, "question")                          the text of a field, or `Skip` with the reason

.jsonl: an object in each line; .json: a list of objects; .csv and .tsv: a table with names in its first line. A .txt
file is one document, or several with <|endoftext|> between them; of the others a document is one field of a record.
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

END = "<|endoftext|>"  # between the documents of a .txt file
ENDINGS = (".txt", ".jsonl", ".json", ".csv", ".tsv")


def read_records(path: Path, counts: Counts) -> Iterator[tuple[str, dict]]:
    """The records of a file, each with its place. Raises UserError where the file is not there or of another kind."""
    _check(path)
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        values: Iterator[tuple[str, Any]] = _table(path, counts, delimiter="\t" if ending == ".tsv" else ",")
    elif ending == ".json":
        values = _json(path)
    elif ending == ".jsonl":
        values = _json_lines(path, counts)
    else:
        raise UserError(f"{path} has no records: they are read from {', '.join(ENDINGS[1:])} files")
    for place, value in values:
        counts["records"] += 1
        if isinstance(value, dict):
            yield place, value
        else:
            counts.note("not_a_record", place)


def read_documents(path: Path, field: str, counts: Counts) -> Iterator[tuple[str, str]]:
    """The texts of a file, each with its place. `field`: of the records of a file that is no .txt."""
    if path.suffix.lower() != ".txt":
        for place, record in read_records(path, counts):
            try:
                yield place, text_of(record, field)
            except Skip as reason:
                note(counts, reason, place, record)
        return
    _check(path)
    text = unified("".join(line for _, line in _lines(path, counts)))
    documents = [document.strip() for document in text.split(END)]
    for number, document in enumerate(documents, start=1):
        if document:
            counts["records"] += 1
            yield f"{path.name}#{number}", document
        elif number < len(documents):  # behind the last mark there need not be a text
            counts.note("empty_text", f"{path.name}#{number}")


def text_of(record: dict, field: str) -> str:
    """The text of a field, with LF line ends. Raises `Skip` where there is none."""
    value = record.get(field)
    if value is None:
        raise Skip("missing_field")
    if not isinstance(value, str):
        raise Skip("not_a_text")
    if not value.strip():
        raise Skip("empty_text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell but no file can hold
        raise Skip("not_utf8") from None
    return unified(value)


def unified(text: str) -> str:
    """The text with LF line ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def note(counts: Counts, reason: Skip, place: str, record: dict) -> None:
    """Count a record that is left out. A missing field is often a misspelt one, so those that there are get named."""
    fields = ", ".join(str(name) for name in record if name is not None)
    missing = f" (its fields: {fields[:80]})" if str(reason) == "missing_field" else ""
    counts.note(str(reason), place + missing)


def _check(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"no file {path}")
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"{path}: texts are read from {', '.join(ENDINGS)} files")


def _lines(path: Path, counts: Counts) -> Iterator[tuple[int, str]]:
    """Lines with their numbers and ends, those that are not UTF-8 left out."""
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
        raise UserError(f"{path} must hold a list of objects; a file with an object in each line ends in .jsonl")
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
