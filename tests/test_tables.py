"""Tables: what stands in files that people really have is read right, or left out with a reason."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import pytest

from src.preparation.counts import Counts
from src.preparation.records import read_records
from tests.test_sources import read

MARK, NEXT = "(a quotation mark)", "(it may go on in the next line)"

# file, content -> image and captions of each row that is used, and what is left out with its example
TABLES: dict[str, tuple[str, str | bytes, list, dict[str, str]]] = {
    "semicolons": ("a.csv", "image;caption\na.jpg;A ball, red.\nb.jpg;B\n", [("a", "A ball, red."), ("b", "B")], {}),
    "header": ("a.csv", " Image , CAPTION \na.jpg,A\n", [("a", "A")], {}),
    "excel": ("a.csv", "sep=;\nimage;caption;;\na.jpg;A, b;;\n", [("a", "A, b")], {}),
    "paragraphs": ("a.csv", 'image,caption\r\na.jpg,"A.\r\n\r\nIt is red, and big."\r\nb.jpg,B\r\n',
                   [("a", "A.\n\nIt is red, and big."), ("b", "B")], {}),
    "old Mac": ("a.csv", "image,caption\ra.jpg,A\rb.jpg,B\r", [("a", "A"), ("b", "B")], {}),
    "blanks": ("a.csv", 'image, caption\na.jpg, "A, b"\n b.jpg , B\n', [("a", "A, b"), ("b", "B")], {}),
    "comma": ("a.csv", "image,caption\na.jpg,A ball, red\nb.jpg,B\n", [("b", "B")],
              {"broken_row": "a.csv:2 (3 cells for 2 columns)"}),
    "comma, three columns": ("a.csv", "image,caption,x\na.jpg,A ball, red, big\nb.jpg,B\nc.jpg,C,1\n", [("c", "C")],
                             {"broken_row": "a.csv:2 (4 cells for 3 columns)"}),
    "quote": ("a.csv", 'image,caption\nd.jpg,D\na.jpg,A\na.jpg,"A ball\nb.jpg,B\nc.jpg,"C, c"\nb.jpg,B\nwords, more\n',
              [("d", "D")], {"broken_row": f"a.csv:3 {NEXT}"}),
    "quote that another one closes": ("a.csv", 'image,caption\na.jpg,"A ball\nb.jpg,B\nc.jpg,a 5"\nd.jpg,D\n',
                                      [("d", "D")], {"broken_row": f"a.csv:2 {MARK}"}),
    "quote, caption first": ("a.csv", 'caption,image\nD,d.jpg\n"A ball,a.jpg\nB 5",b.jpg\nC,c.jpg\n',
                             [("d", "D"), ("c", "C")], {"broken_row": f"a.csv:3 {MARK}"}),
    "quote, all quoted": ("a.csv", '"image","caption"\n"a.jpg","A\n"b.jpg","B, b"\n"c.jpg","C"\n', [("c", "C")],
                          {"broken_row": f"a.csv:2 {MARK}"}),
    "quotes not doubled": ("a.csv", 'image,caption\na.jpg,"A "pink" ball\nthat is round, too."\nb.jpg,B\n',
                           [("b", "B")], {"broken_row": f"a.csv:2 {MARK}"}),
    "several lines, caption first": ("a.csv", 'caption,image\n"A.\nRed, big.",a.jpg\n"B.\nRed.",b.jpg\n',
                                     [("a", "A.\nRed, big."), ("b", "B.\nRed.")], {}),
    "lines that look like rows": ("a.csv", 'image,caption\na.jpg,"A page:\nb.jpg, red\nc.jpg, blue"\nd.jpg,D\n',
                                  [("d", "D")], {"broken_row": f"a.csv:2 {MARK}"}),
    "line end": ("a.csv", "image,caption\na.jpg,A ball.\nIt is red.\nb.jpg,B\n", [("b", "B")],
                 {"broken_row": f"a.csv:2 {NEXT}"}),
    "blank before a quote": ("a.csv", 'image,caption\na.jpg, "A"\nb.jpg,B\n', [("b", "B")],
                             {"broken_row": f"a.csv:2 {MARK}"}),
    "quotes of a text": ("a.csv", 'image,caption\na.jpg,A 6" ball\nb.jpg,"The ""B"""\n',
                         [("a", 'A 6" ball'), ("b", 'The "B"')], {}),
    "captions.txt": ("captions.txt", "image,caption\na.jpg,A child .\na.jpg,A girl .\n",
                     [("a", "A child ."), ("a", "A girl .")], {}),
    "captions.txt with tabs": ("captions.txt", "image\tcaption\na.jpg\tA, b\n", [("a", "A, b")], {}),
    "Flickr8k.token.txt": ("a.token.txt", 'a.jpg#0\tA child, in a "pink" dress .\na.jpg#1\t"Hi" says she .\n',
                           [("a", 'A child, in a "pink" dress .'), ("a", '"Hi" says she .')], {}),
    "quoted, cut at the end": ("a.tsv", 'image\tcaption\na.jpg\t"A ""big"" cat"\nb.jpg\t"A dog"\nc.jpg\tC\nd.jpg\t"D',
                               [("a", 'A "big" cat'), ("b", "A dog")], {"broken_row": f"a.tsv:4 {NEXT}"}),
    "Flickr30k": ("results.csv", "image_name| comment_number| comment\na.jpg| 0| Two men, standing .\n",
                  [("a", "Two men, standing .")], {}),
    "no header": ("a.csv", "a.jpg,A\nb.jpg,B\n", [("a", "A"), ("b", "B")], {}),
    "tabs quote nothing": ("a.tsv", 'image\tcaption\na.jpg\t"A\nb.jpg\tB\n', [("b", "B")],
                           {"broken_row": "a.tsv:2 (a quotation mark)"}),
    "Latin-1": ("a.csv", "image,caption\na.jpg,Caf\xe9\nb.jpg,B\n".encode("latin1"), [("b", "B")],
                {"not_utf-8": "a.csv:2"}),
    "NUL": ("a.csv", "image,caption\na.jpg,A\0\nb.jpg,B\n", [("b", "B")], {"nul_character": "a.csv:2"}),
    "lists in cells": ("a.csv", """image,caption
a.jpg,"['A cat.', 'A dog.']"
b.jpg,"[""A x."", null]"
c.jpg,"[[""A""],[""B""]]"
d.jpg,"('A', 'B')"
""", [("a", "A cat.", "A dog."), ("b", "A x."), ("c", "A", "B"), ("d", "A", "B")], {}),
    "lists of NumPy": ("a.csv", "image,caption\na.jpg,\"['A cat.' 'A dog.']\"\nb.jpg,B\nc.jpg,\"array(['A'])\"\n",
                       [("b", "B")], {"unreadable_list": "a.csv:2"}),
    "no captions": ("a.csv", "image,caption\na.jpg,[]\nb.jpg,nan\nc.jpg,[5]\nd.jpg,(A dog)\n", [("d", "(A dog)")],
                    {"empty_caption": "a.csv:2", "caption_not_text": "a.csv:4"}),
    "no question": ("a.csv", "image,caption,prompt\na.jpg,A,nan\nb.jpg,B,\n", [("a", "A"), ("b", "B")], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_people_have(case: str, tmp_path: Path) -> None:
    name, content, used, left_out = TABLES[case]
    entries, counts = read(tmp_path, name, content, ("a.jpg", "b.jpg", "c.jpg", "d.jpg"))
    assert [(path.stem, *(c.text for c in entry.captions)) for entry, path in entries if path] == used
    assert counts.examples == left_out


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_tables_of_the_csv_module_are_read_back(delimiter: str, quoting: Any, tmp_path: Path) -> None:
    """Texts with delimiters, quotes and line ends come back as they were, or are left out and counted."""
    rng = random.Random(0)
    pieces = ["a", " b", '"', "\n", ",", ";", "\t", "|", "\n\n", "word "]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 9))) + "." for _ in range(300)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
        writer.writerows([("number", "text"), *enumerate(texts)])
    counts = Counts()
    rows = [row for _, row in read_records(tmp_path / "a.csv", counts)]
    assert all(texts[int(row["number"])] == row["text"] for row in rows)
    assert len(rows) > 250 and set(counts) <= {"records", "broken_row"}


PIECES = ["a", "b ", "c, d, e", "\n", '"q"', "word "]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("names", ["{}.jpg", "question {}?"])
def test_a_stray_quotation_mark_never_cuts_or_joins_texts(delimiter: str, names: str, tmp_path: Path) -> None:
    """One is put before or behind a cell or a line, or one is taken out, anywhere in a proper table."""
    num_read = 0
    for seed in range(120):
        rng = random.Random(seed)
        rows = [(names.format(n), "".join(rng.choices(PIECES, k=rng.randrange(1, 6))).strip() + ".") for n in range(9)]
        quoting = csv.QUOTE_MINIMAL if seed % 2 else csv.QUOTE_ALL
        writer = csv.writer(stream := io.StringIO(), delimiter=delimiter, quoting=quoting, lineterminator="\n")
        writer.writerows([("image", "text"), *rows])
        text, start = stream.getvalue(), stream.getvalue().index("\n") + 1
        if seed % 3:
            ends = {delimiter, "\n"}
            at = rng.choice([n for n in range(start, len(text)) if ends & {text[n - 1], text[n]}])
            text = f'{text[:at]}"{text[at:]}'
        elif marks := [n for n in range(start, len(text)) if text[n] == '"']:
            at = rng.choice(marks)
            text = text[:at] + text[at + 1 :]
        (tmp_path / "a.csv").write_text(text)
        read = [tuple(row.values()) for _, row in read_records(tmp_path / "a.csv", Counts())]
        assert {unquoted(row) for row in read} <= {unquoted(row) for row in rows}, text
        num_read += len(read)
    assert num_read > 120 * 4


def unquoted(row: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(cell.replace('"', "") for cell in row)
