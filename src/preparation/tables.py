"""Read tables: CSV, TSV and their relatives, with commas, semicolons, tabs or | between the cells.

    read_table(Path("captions.csv"))       ("captions.csv:2", {"image": "a.jpg", "caption": "A cat."}), ...

No text is cut or joined in silence. Left out are rows with more or fewer cells than columns, as a text may be cut at a
comma, and the row before, as its text may go on there; texts of several lines that may be rows, swallowed by a stray
quotation mark; and, once a quotation mark cannot be right, all that is not a row for certain, because it names an image
file. Tabs and | do not occur in texts: with these each line is a row if quotation marks cannot be right and few
cells look quoted, as in Flickr's files, which quote nothing.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

from src.io.errors import UserError
from src.preparation.counts import Skip
from src.preparation.json_text import NOT_UTF8, open_text

IMAGE_FILE = re.compile(
    r"[^\n,;\t|]*?\.(jpe?g|jfif|png|webp|avif|gif|bmp|tiff?)(#\d+)? *(?=[\n,;\t|]|$)", re.IGNORECASE
)
QUOTED = re.compile(r'"([^"]|"")*"')  # a cell between quotation marks, doubled inside
DELIMITERS = ",;\t|"
LONGEST = 1 << 24  # characters of a cell


def read_table(path: Path) -> Iterator[tuple[str, dict | Skip]]:
    """(place, row) of a table whose first line names the columns; they are `image` and `caption` if it names an image
    file instead. A `Skip` is what cannot be read. Raises UserError for two columns of one name."""
    num_before, columns, form = read_header(path)
    if twice := {name for name in columns if name and columns.count(name) > 1}:
        raise UserError(f"{path} has two columns {twice.pop()!r}: rename one")
    read = partial(read_rows, path, num_before, len(columns))
    if form["delimiter"] in "\t|" and any(not cells for _, cells in read(form)):
        unquoted = form | {"quoting": csv.QUOTE_NONE}
        marked = [cell for _, cells in read(unquoted) for cell in cells if cell.startswith('"')]
        if 2 * sum(map(bool, map(QUOTED.fullmatch, marked))) <= len(marked):
            form = unquoted
    end = (range(0), columns)
    for (lines, cells), (_, following) in pairwise(chain(read(form), [end])):
        place = f"{path.name}:{lines[0]}"
        if not cells or may_be_wrong(cells, form):
            yield from ((f"{path.name}:{number}", Skip("broken_row", " (a quotation mark)")) for number in lines)
        elif len(cells) != len(columns):
            yield place, Skip("broken_row", f" ({len(cells)} cells for {len(columns)} columns)")
        elif len(following) != len(columns) and not num_images(following):
            yield place, Skip("broken_row", " (it may go on in the next line)")
        elif any(map(NOT_UTF8.search, cells)):
            yield place, Skip("not_utf-8")
        else:
            yield place, dict(zip(columns, cells, strict=True))


def read_rows(
    path: Path, num_before: int, num_columns: int, form: Mapping[str, Any]
) -> Iterator[tuple[range, list[str]]]:
    """(numbers of its lines, cells) of each row that is not blank. No cells: what is no row for certain."""
    csv.field_size_limit(LONGEST)
    with open_text(path) as stream:
        rows, is_lost = csv.reader(islice(stream, num_before, None), **form), False
        while True:
            start = num_before + rows.line_num + 1
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error:  # a quotation mark that is not closed, or not doubled inside of a text
                cells, is_lost = [], True
            else:
                if not any(map(str.strip, cells)):
                    continue
                while len(cells) > num_columns and not cells[-1].strip():  # commas at the ends of lines
                    cells.pop()
            lines = range(start, num_before + rows.line_num + 1)
            yield lines, [] if is_lost and not num_images(cells) else cells


def read_header(path: Path) -> tuple[int, list[str], dict[str, Any]]:
    """The number of lines before the rows, the names of the columns, and the format for `csv.reader`."""
    with open_text(path) as stream:
        lines = ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
        number, header = next(lines, (0, ""))
        delimiter = ""
        if header.lower().startswith("sep=") and len(header.strip()) <= len("sep=;"):  # written by Excel
            delimiter = header[4]
            number, header = next(lines, (number, ""))
    named = IMAGE_FILE.match(header)  # what follows a file name is the delimiter
    if not delimiter and named and header[named.end() : named.end() + 1] in DELIMITERS:
        delimiter = header[named.end()]
    unquoted = re.sub(r'"[^"]*"', "", header)
    delimiter = delimiter or ("\t" if "\t" in header else max(DELIMITERS, key=unquoted.count))
    columns = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    form = {"delimiter": delimiter, "skipinitialspace": f"{delimiter} " in header, "strict": True}
    if columns and IMAGE_FILE.fullmatch(columns[0]):
        return number - 1, ["image", "caption"], form
    if len(columns) == 1:
        form["delimiter"] = "\x1f"  # texts may hold any of DELIMITERS, as there is nothing to delimit
    while len(columns) > 1 and not columns[-1]:
        columns.pop()
    return number, columns, form


def may_be_wrong(cells: list[str], form: Mapping[str, Any]) -> bool:
    """Whether the quotation marks of a row may be wrong."""
    # 1. one that is not closed in its line, or has become a part of the text, as there are blanks before it
    if "quoting" in form:
        return any(cell.startswith('"') and cell.count('"') % 2 for cell in cells)
    if any(re.match(r'\s+"', cell) for cell in cells):
        return True
    # 2. lines that may be rows: they name other image files; in a table without image files each has as many cells, or
    # they start or end with a number, as the row does (the number of an image)
    lines = [line.split(form["delimiter"]) for line in form["delimiter"].join(cells).split("\n") if line.strip()]
    if len(lines) == 1 or len(cells) == 1:
        return False
    if num := num_images(cells):
        return sum(map(num_images, lines)) > num
    blank = " " if form["skipinitialspace"] else ""
    for end in (0, -1):
        if cells[end].isdecimal() and sum(len(line) > 1 and line[end].strip(blank).isdecimal() for line in lines) > 1:
            return True
    return all(len(line) == len(cells) for line in lines)


def num_images(cells: list[str]) -> int:
    return sum(bool(IMAGE_FILE.fullmatch(cell.strip())) for cell in cells)
