"""Read tables: CSV, TSV and their relatives, with commas, semicolons, tabs or | between the cells.

    read_table(Path("captions.csv"))       ("captions.csv:2", {"image": "a.jpg", "caption": "A cat."}), ...

No text is cut or joined in silence: a row with more or fewer cells than columns is left out, as a text in it may be cut
at a comma. If a quotation mark is not closed, the lines behind it are read again where they look like rows, and are
left out otherwise.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from src.io.errors import UserError
from src.preparation.counts import Skip
from src.preparation.json_text import NOT_UTF8, open_text

IMAGE_FILE = re.compile(
    r"[^\n,;\t|]*?\.(jpe?g|jfif|png|webp|avif|gif|bmp|tiff?)(#\d+)? *(?=[\n,;\t|]|$)", re.IGNORECASE
)
DELIMITERS = ",;\t|"

Line = tuple[int, str]  # number, text with the line end


class Lines:
    """The lines of a file, some of which may be put back."""

    def __init__(self, stream: TextIO) -> None:
        self._lines = enumerate(stream, start=1)
        self._waiting: deque[Line] = deque()

    def take(self) -> Line | None:
        return self._waiting.popleft() if self._waiting else next(self._lines, None)

    def row(self) -> Line | None:
        """The next line that is not blank."""
        while (line := self.take()) and not line[1].strip():
            pass
        return line

    def put_back(self, lines: list[Line]) -> None:
        self._waiting.extendleft(reversed(lines))


def read_table(path: Path) -> Iterator[tuple[str, dict | Skip]]:
    """(place, row) of a table whose first line names the columns; they are `image` and `caption` if it names an image
    file instead. A `Skip` is what cannot be read. Raises UserError for two columns of one name."""
    with open_text(path) as stream:
        lines = Lines(stream)
        delimiter, columns = read_header(lines)
        if twice := {name for name in columns if name and columns.count(name) > 1}:
            raise UserError(f"{path} has two columns {twice.pop()!r}: rename one")
        while row := lines.row():
            span, cells = read_row(row, lines, delimiter, len(columns))
            place = f"{path.name}:{span[0][0]}"
            while len(cells) > len(columns) and not cells[-1].strip():  # commas at the ends of lines
                cells.pop()
            if not cells:
                yield from ((f"{path.name}:{number}", Skip("broken_row", " (a quotation mark)")) for number, _ in span)
            elif len(cells) != len(columns):
                yield place, Skip("broken_row", f" ({len(cells)} cells for {len(columns)} columns)")
            elif any(NOT_UTF8.search(line) for _, line in span):
                yield place, Skip("not_utf-8")
            else:
                yield place, dict(zip(columns, cells, strict=True))


def read_header(lines: Lines) -> tuple[str, list[str]]:
    """The delimiter and the names of the columns."""
    number, header = lines.row() or (0, "")
    delimiter = ""
    if header.lower().startswith("sep=") and len(header.strip()) <= len("sep=;"):  # written by Excel
        delimiter = header[4]
        number, header = lines.row() or (0, "")
    named = IMAGE_FILE.match(header)  # what follows a file name is the delimiter
    if not delimiter and named and header[named.end() : named.end() + 1] in DELIMITERS:
        delimiter = header[named.end()]
    unquoted = re.sub(r'"[^"]*"', "", header)
    delimiter = delimiter or ("\t" if "\t" in header else max(DELIMITERS, key=unquoted.count))
    columns = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    if columns and IMAGE_FILE.fullmatch(columns[0]):
        lines.put_back([(number, header)])
        return delimiter, ["image", "caption"]
    while len(columns) > 1 and not columns[-1]:
        columns.pop()
    return delimiter, columns


def read_row(row: Line, lines: Lines, delimiter: str, num_columns: int) -> tuple[list[Line], list[str]]:
    """The lines and the cells of the row that begins with a line. No cells: its quotation marks cannot be right."""
    span, num_delimiters = [row], num_columns - 1
    if '"' not in row[1]:
        return span, row[1].rstrip("\n").split(delimiter)

    def texts() -> Iterator[str]:
        yield row[1]
        while line := lines.take():
            span.append(line)
            yield line[1]

    spaced = f'{delimiter} "' in row[1]
    try:
        cells = next(csv.reader(texts(), delimiter=delimiter, strict=True, skipinitialspace=spaced))
    except csv.Error:  # a field that is too long, or a quotation mark that is not closed
        literal = delimiter == "\t" and len(span) == 1  # tables with tabs often quote nothing
        cells = row[1].rstrip("\n").split(delimiter) if literal else []
    by_count = delimiter == "\t" and not cells
    later = [index for index, (_, line) in enumerate(span) if index and is_row(line, delimiter, num_columns, by_count)]
    if later:  # the quotation mark has swallowed them
        lines.put_back(span[later[0] :])
        return span[: later[0]], []
    if len(span) > 1 and num_delimiters and all(line.count(delimiter) == num_delimiters for _, line in span):
        return span, []  # each line may be a row of its own
    return span, cells


def is_row(line: str, delimiter: str, num_columns: int, by_count: bool) -> bool:
    """Whether a line inside of quotation marks is a row of its own: it names an image, or has as many cells."""
    cells = [cell.strip(' "') for cell in line.rstrip("\n").split(delimiter)]
    is_exact = by_count and len(cells) == num_columns
    return len(cells) >= num_columns and (is_exact or any(map(IMAGE_FILE.fullmatch, cells)))
