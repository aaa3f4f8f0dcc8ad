"""Read record files of any kind: the one reader for annotations and texts. Files of any size are read in pieces.

    read_records(Path("gsm8k.jsonl"), counts)      ("gsm8k.jsonl:17", {"question": ..., "answer": ...}), ...

    .csv, .tsv   a table whose first line names the columns, which commas, semicolons, tabs or | separate
    .txt         one document, or several separated by <|endoftext|>, as records {"text": document}
    any other    JSON: a list of records, records one after another (in lines or over several), COCO's tables, tables
                 with names ({"data": [...]}, {"train": [...]}), {name: record}, or {file name: captions}

What cannot be read is counted and left out, with its file and line (`:17`) or number (`#17`) as the example.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from src.io.errors import UserError
from src.preparation.counts import Counts, Skip
from src.preparation.json_text import NOT_UTF8, JsonText, TooLong, open_text
from src.preparation.sources import coco
from src.preparation.splits import SPLIT_NAMES

SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file
FILE_NAME = re.compile(r"\.\w{2,5}$")
IMAGE_FILE = re.compile(r"\s*[^\n]*\.(jpe?g|jfif|png|webp|avif|gif|bmp|tiff?)(#\d+)?\s*", re.IGNORECASE)
DELIMITERS = ",;\t|"
LARGE = 1 << 24  # characters: a longer object is no record
NUM_KEYS = 100  # of an object, from which its form is told

Value = tuple[str, Any]  # place, and a record, or a `Skip` for what cannot be read


def read_records(
    path: Path, counts: Counts, reader: Callable[[Path], Iterator[Value]] | None = None
) -> Iterator[tuple[str, dict]]:
    """Yield (place, record). reader: for files of another form.

    Raises UserError if the file is missing, or is a JSON list, or one JSON object of many records, with a syntax error.
    """
    if not path.is_file():
        raise UserError(f"no file {path}")
    readers = {".csv": read_table, ".tsv": read_table, ".txt": _documents}
    for place, value in (reader or readers.get(path.suffix.lower(), _json))(path):
        if isinstance(value, Skip):
            counts.skip(value, place)
            continue
        counts["records"] += 1
        if isinstance(value, dict):
            yield place, value
        else:
            counts.skip("not_a_record", place)


def text_of(record: dict, field: str) -> str:
    """The text of a field, with LF line ends. A field in other case, or with blanks around it, is the same.

    Raises `Skip` if it is missing, empty or not text.
    """
    plain = field.strip().casefold()
    same = (name for name in record if isinstance(name, str) and name.strip().casefold() == plain)
    value = record.get(field if field in record else next(same, field))
    if value is None:
        names = ", ".join(str(name) for name in record)
        raise Skip("missing_field", f" (its fields: {names[:80]})")  # shows a misspelling
    if not isinstance(value, str):
        raise Skip("not_a_text")
    if not value.strip():
        raise Skip("empty_text")
    return clean(value)


def clean(text: str) -> str:
    """The text with LF line ends. Raises `Skip` for a NUL character, and for half of a surrogate pair, which is valid
    in JSON, but cannot be stored as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Skip("not_utf-8") from None
    if "\0" in text:
        raise Skip("nul_character")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json(path: Path) -> Iterator[Value]:
    with open_text(path) as stream:
        text = JsonText(stream)
        first, number = text.peek(), 0
        if first == "{" and _is_one_object(path):
            records = enumerate(_object(path), start=1)
            yield from ((f"{path.name}#{number}", record) for number, record in records)
            return
        # 1. a list
        if first == "[":
            try:
                for number, value in enumerate(text.elements(), start=1):  # noqa: B007
                    yield f"{path.name}#{number}", value
            except (ValueError, RecursionError) as error:
                raise _not_json(path, error, text) from error
        # 2. values that white space separates; after a broken one, reading goes on in the next line
        while text.peek():
            place = f"{path.name}:{text.line}"
            try:
                yield place, text.value()
            except (ValueError, RecursionError):
                yield place, Skip(text.skip_line())


def _is_one_object(path: Path) -> bool:
    """Whether a file is a single object: nothing follows it, or it is too long for a record."""
    with open_text(path) as stream:
        text = JsonText(stream)
        try:
            text.value(limit=LARGE)
        except TooLong:
            return True
        except (ValueError, RecursionError):
            return False
        return not text.peek()


def _object(path: Path) -> Iterator[Any]:
    """The records of a file that is a single object."""
    # 1. its keys, with the first value of each
    first: dict[str, Any] = {}
    listed: set[str] = set()
    for key, value, is_element in _pairs(path):
        first.setdefault(key, value)
        listed |= {key} if is_element else set()
        if len(first) >= NUM_KEYS:
            break
    records = {key for key, value in first.items() if isinstance(value, dict)}
    tables = listed & records
    file_names = [key for key in first if FILE_NAME.search(key) or (key.isdecimal() and key not in records)]
    # 2. its records
    if not {"conversations", "messages"}.isdisjoint(first):
        yield from _whole(path)
    elif {"images", "annotations"} <= tables:  # COCO: annotations name images by their ids
        yield from coco.join(partial(_pairs, path))
    elif first and 2 * len(file_names) >= len(first):
        for key, value, _ in _pairs(path):
            yield {"image": key, **value} if isinstance(value, dict) else {"image": key, "captions": value}
    elif tables:
        for key, value, _ in _pairs(path):
            if key in tables and isinstance(value, dict):
                yield {"split": key, **value} if key.lower() in SPLIT_NAMES else value
            elif key in tables:
                yield value
    elif first and 2 * len(records) >= len(first):
        for key, value, _ in _pairs(path):
            yield {"id": key, **value} if isinstance(value, dict) else value
    else:
        yield from _whole(path)


def _pairs(path: Path) -> Iterator[tuple[str, Any, bool]]:
    with open_text(path) as stream:
        text = JsonText(stream)
        try:
            yield from text.pairs()
        except (ValueError, RecursionError) as error:
            raise _not_json(path, error, text) from error


def _whole(path: Path) -> Iterator[Any]:
    with open_text(path) as stream:
        yield JsonText(stream).value()


def _not_json(path: Path, error: Exception, text: JsonText) -> UserError:
    return UserError(f"{path} is not valid JSON: {getattr(error, 'msg', error)} (at or behind line {text.line})")


def read_table(path: Path) -> Iterator[Value]:
    """The rows of a table. Without a header, a first cell that names an image file is of the columns image, caption.

    A row with more or fewer cells than columns is left out, as a text in it may be cut at a comma. If a quotation mark
    is not closed, the lines behind it are read again as rows if they look like rows, and are left out otherwise.
    """
    with open_text(path) as stream:
        lines = enumerate(stream, start=1)
        not_blank = ((number, line) for number, line in lines if line.strip())
        # 1. the delimiter, and the columns
        number, header = next(not_blank, (0, ""))
        delimiter = ""
        if header.lower().startswith("sep=") and len(header.strip()) <= 5:  # written by Excel
            delimiter = header.rstrip("\n")[4:]
            number, header = next(not_blank, (0, ""))
        unquoted = re.sub(r'"[^"]*"', "", header)
        delimiter = delimiter or max(DELIMITERS, key=unquoted.count)
        columns = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        waiting: deque[tuple[int, str]] = deque()
        if columns and IMAGE_FILE.fullmatch(columns[0]):
            columns = ["image", "caption"]
            waiting.append((number, header))
        while len(columns) > 1 and not columns[-1]:
            columns.pop()
        if twice := {name for name in columns if name and columns.count(name) > 1}:
            raise UserError(f"{path} has two columns {twice.pop()!r}: rename one")
        last = len(columns) - 1

        def is_row(line: str) -> bool:
            cells = line.split(delimiter)
            is_exact = delimiter == "\t" and len(cells) == last + 1  # no caption holds tabs
            return len(cells) > last and (is_exact or any(map(IMAGE_FILE.fullmatch, cells)))

        # 2. its rows
        while row := waiting.popleft() if waiting else next(lines, None):
            number, line = row
            if not line.strip():
                continue
            span = [row]  # the lines of this row
            if '"' in line:

                def feed(span: list[tuple[int, str]] = span) -> Iterator[str]:
                    yield span[0][1]
                    while following := waiting.popleft() if waiting else next(lines, None):
                        span.append(following)
                        yield following[1]

                spaced = bool(re.search(re.escape(delimiter) + ' +"', line))
                try:
                    cells = next(csv.reader(feed(), delimiter=delimiter, strict=True, skipinitialspace=spaced))
                except csv.Error:  # a field that is too long, or a quotation mark that is not closed
                    cells = line.rstrip("\n").split(delimiter) if delimiter == "\t" and len(span) == 1 else []
                rows = [index for index, (_, later) in enumerate(span) if index and is_row(later)]
                if rows:  # the quotation mark has swallowed them
                    waiting.extendleft(reversed(span[rows[0] :]))
                    del span[rows[0] :]
                    cells = []
                elif len(span) > 1 and last and all(later.count(delimiter) == last for _, later in span):
                    cells = []  # each may be a row of its own
            else:
                cells = line.rstrip("\n").split(delimiter)
            while len(cells) > last + 1 and not cells[-1].strip():  # commas at the ends of lines
                cells.pop()
            if not cells:
                yield from ((f"{path.name}:{number}", Skip("broken_row", " (a quotation mark)")) for number, _ in span)
            elif len(cells) != last + 1:
                detail = f" ({len(cells)} cells for {last + 1} columns)"
                yield f"{path.name}:{number}", Skip("broken_row", detail)
            elif any(NOT_UTF8.search(later) for _, later in span):
                yield f"{path.name}:{number}", Skip("not_utf-8")
            else:
                yield f"{path.name}:{number}", dict(zip(columns, cells, strict=True))


def _documents(path: Path) -> Iterator[Value]:
    number, parts = 0, []
    with open_text(path) as stream:
        for line_number, line in enumerate(stream, start=1):
            if NOT_UTF8.search(line):
                yield f"{path.name}:{line_number}", Skip("not_utf-8")
                continue
            *ends, rest = line.split(SEPARATOR)
            for end in ends:
                number += 1
                yield f"{path.name}#{number}", {"text": "".join([*parts, end]).strip()}
                parts = []
            parts.append(rest)
    text = "".join(parts).strip()
    if text or not number:  # a separator may end the file
        yield f"{path.name}#{number + 1}", {"text": text}
