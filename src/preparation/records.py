"""Read record files of any kind: the one reader for annotations and texts. Files of any size are read in pieces.

    read_records(Path("gsm8k.jsonl"), counts)      ("gsm8k.jsonl:17", {"question": ..., "answer": ...}), ...

    .csv, .tsv   a table whose first line names the columns
    .parquet     a table
    .txt         one document, or several separated by <|endoftext|>, as records {"text": document}
    .jsonl       JSON records one after another, in lines or over several lines
    any other    JSON: the same, a list of records, COCO's tables, tables by name ({"data": [...]}, {"train": [...]}),
                 {name: record}, or {file name: captions}

What cannot be read is counted and left out, with its file and line (`:17`) or number (`#17`) as the example.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

from src.io.errors import UserError
from src.preparation.counts import Counts, Skip
from src.preparation.json_text import NOT_UTF8, JsonText, open_text
from src.preparation.sources import coco
from src.preparation.splits import SPLIT_NAMES
from src.preparation.tables import read_table

NAN = {"nan", "<na>"}  # what Pandas writes for no value
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip", ".tar"}
SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file
ROWS = 16  # of Parquet in memory, which may hold images
FILE_NAME = re.compile(r"\.\w{2,5}$")
NUM_KEYS = 100  # of an object, from which its form is told
LARGE = 10_000  # values: a larger object that begins a .json file is the whole file

Value = tuple[str, Any]  # place, and a record, or a `Skip` for what cannot be read


def read_records(
    path: Path, counts: Counts, reader: Callable[[Path], Iterator[Value]] | None = None
) -> Iterator[tuple[str, dict]]:
    """Yield (place, record). reader: for files of another form.

    Raises UserError if the file is missing or compressed, or is a JSON list, or one JSON object of many records, with a
    syntax error.
    """
    if not path.is_file():
        raise UserError(f"no file {path}")
    if path.suffix.lower() in COMPRESSED:
        raise UserError(f"{path} is compressed: unpack it first")
    readers = {".csv": read_table, ".tsv": read_table, ".parquet": read_parquet, ".txt": _documents}
    for place, value in (reader or readers.get(path.suffix.lower(), _json))(path):
        counts["records"] += 1
        if isinstance(value, dict):
            yield place, value
        else:
            counts.skip(value if isinstance(value, Skip) else "not_a_record", place)


def matching_files(names: str | Sequence[str]) -> list[str]:
    """The files of one name or several; one with * stands for all that match.

    Raises UserError if none matches, and for a name that is not UTF-8.
    """
    files = []
    for name in [names] if isinstance(names, str) else names:
        matching = sorted(glob(name)) if "*" in name else [name]
        if not matching:
            raise UserError(f"no file {name}")
        files += matching
    if odd := [name for name in files if NOT_UTF8.search(name)]:
        raise UserError(f"the name of the file {odd[0]!r} is not UTF-8: rename it")
    return files


def text_of(record: dict, field: str) -> str:
    """The text of a field, with LF line ends. A field in other case, or with blanks around it, is the same.

    Raises `Skip` if it is missing, empty or not text.
    """
    value = value_of(record, field)
    if value is None:
        names = ", ".join(str(name) for name in record)
        raise Skip("missing_field", f" (its fields: {names[:80]})")  # shows a misspelling
    if not isinstance(value, str):
        raise Skip("not_a_text")
    if not value.strip():
        raise Skip("empty_text")
    return clean(value)


def value_of(record: dict, field: str) -> Any:
    """The value of a field; None if it is missing or NaN. See `text_of`."""
    plain = field.strip().casefold()
    same = (name for name in record if isinstance(name, str) and name.strip().casefold() == plain)
    value = record.get(field if field in record else next(same, field))
    return None if str(value).strip().lower() in NAN else value


def check_turns(record: dict) -> None:
    """Raises `Skip` for a system text or earlier turns, as in LLaMA-Factory: these would be lost."""
    for field, reason in (("system", "system_text"), ("history", "earlier_turns")):
        if value_of(record, field):
            raise Skip(reason)


def with_input(instruction: str, record: dict) -> str:
    """The question of an Alpaca record, whose `input` stands behind its instruction."""
    return f"{instruction}\n\n{text_of(record, 'input')}" if value_of(record, "input") else instruction


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
        if first == "{" and path.suffix.lower() != ".jsonl" and _is_one_object(path):
            records = enumerate(_object(path), start=1)
            yield from ((f"{path.name}#{number}", record) for number, record in records)
            return
        # 1. a list
        if first == "[":
            try:
                for number, value in enumerate(text.elements(), start=1):
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
    """Whether a file is a single object: nothing follows it, or it is too large for a record."""
    with open_text(path) as stream:
        text = JsonText(stream)
        try:
            return sum(1 for _ in islice(text.pairs(), LARGE)) == LARGE or not text.peek()
        except (ValueError, RecursionError):
            return False


def _object(path: Path) -> Iterator[Any]:
    """The records of a file that is a single object."""
    # 1. its keys: those of records, and those of lists of records
    first: dict[str, Any] = {}
    records, tables = set[str](), set[str]()
    for key, value, is_element in _pairs(path):
        if key not in first and isinstance(first.setdefault(key, value), dict):
            (tables if is_element else records).add(key)
        if len(first) >= NUM_KEYS:
            break
    file_names = [key for key in first if FILE_NAME.search(key) or (key.isdecimal() and isinstance(first[key], str))]
    # 2. its records
    if not {"conversations", "messages"}.isdisjoint(first):
        return _whole(path)
    if {"images", "annotations"} <= tables:
        return coco.join(partial(_pairs, path))
    if first and 2 * len(file_names) >= len(first):
        return (_keyed(key, value, "image") for key, value, _ in _pairs(path))
    if tables:
        rows = ((key.lower(), value) for key, value, _ in _pairs(path) if key in tables)
        return (_keyed(key, value, "split") if key in SPLIT_NAMES else value for key, value in rows)
    if first and 2 * len(records) >= len(first):
        return (_keyed(key, value, "id") for key, value, _ in _pairs(path))
    return _whole(path)


def _keyed(key: str, value: Any, name: str) -> Any:
    """A record with its key in the object; captions become one where the key is that of an image."""
    if isinstance(value, dict):
        return {name: key, **value}
    return {"image": key, "captions": value} if name == "image" else value


def read_parquet(path: Path) -> Iterator[Value]:
    """(place, record) of each row. Raises UserError if the file is damaged or pyarrow is missing."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install -e '.[data]'") from error
    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=ROWS) for row in batch.to_pylist())
            yield from ((f"{path.name}#{number}", row) for number, row in enumerate(rows, start=1))
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def _pairs(path: Path) -> Iterator[tuple[str, Any, bool]]:
    with open_text(path) as stream:
        text = JsonText(stream)
        try:
            yield from text.pairs()
            if text.peek():
                raise ValueError("more than one object; files of such long ones must end in .jsonl")
        except (ValueError, RecursionError) as error:
            raise _not_json(path, error, text) from error


def _whole(path: Path) -> Iterator[Any]:
    with open_text(path) as stream:
        yield JsonText(stream).value()


def _not_json(path: Path, error: Exception, text: JsonText) -> UserError:
    return UserError(f"{path} is not valid JSON: {getattr(error, 'msg', error)} (at or behind line {text.line})")


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
