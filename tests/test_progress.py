"""Bars as they are seen: on a terminal of two widths, read back from its screen, and in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NESTED = """
import logging, time
from src.cli.entrypoint import main_guard
from src.io.progress import Bar

@main_guard
def main(argv):
    with Bar(total=40, unit="step", desc="train", status=lambda: "loss 0.5") as outer:
        for n in range(40):
            time.sleep(0.01)
            outer.update()
            if n == 20:
                options = {"total": 8, "unit": "draft"}
                with Bar(desc="revise", **options) as revise, Bar(desc="draft", **options) as draft:
                    for _ in range(8):
                        draft.update()
                        revise.update()
                        time.sleep(0.02)
                logging.getLogger("x").warning("a message " + "that goes on " * 3)
    for item in Bar(iter("abc"), unit="record", desc="read"):
        pass
    with Bar(total=2, unit="step", desc="silent", disable=True) as bar:  # another rank
        bar.update()
main([])
"""
FAILING = """
from src.cli.entrypoint import main_guard
from src.io.errors import UserError
from src.io.progress import Bar

@main_guard
def main(argv):
    for number in Bar(range(100), unit="record", desc="read"):
        if number == 40:
            raise UserError("record 40 is wrong")
main([])
"""


def in_pipe(code: str, every: float = 30.0) -> list[str]:
    code = f"import src.io.progress\nsrc.io.progress.EVERY_S = {every}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert "\r" not in done.stderr and "\x1b" not in done.stderr
    return done.stderr.splitlines()


def on_terminal(code: str, columns: int, rows: int = 24) -> list[str]:
    """The screen at the end: lines as a terminal shows them, without trailing blanks."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    output = b""
    try:
        while part := os.read(ours, 1 << 16):
            output += part
    except OSError:  # of Linux: the other end is closed
        pass
    os.close(ours)
    process.wait()
    return screen(output.decode(), columns)


def screen(text: str, columns: int) -> list[str]:
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[\d*[A-Z]|[\s\S]", text):
        if token == "\r":
            column = 0
        elif token == "\n":
            row, rows = row + 1, rows + [""] * (row + 2 - len(rows))
        elif token == "\x1b[A":
            row -= 1
        else:
            assert not token.startswith("\x1b"), token
            assert column < columns, f"a line is wider than the terminal: {rows[row]}"
            rows[row] = rows[row].ljust(column)[:column] + token + rows[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in rows if line.strip()]


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_shows_each_outer_bar_once_below_the_messages(columns):
    message, train, read = on_terminal(NESTED, columns)
    assert message == "a message that goes on that goes on that goes on"
    assert re.fullmatch(r"train: 100%\|\S*\| 40/40 \[00:\d\d<00:00, +[\d.]+ step/s, loss 0.5\]", train)
    assert len(train) > columns - 3  # the bar fills the line
    assert re.match(r"read: 3 record \[", read)


def test_an_error_has_a_line_of_its_own():
    assert on_terminal(FAILING, 80)[1:] == in_pipe(FAILING)[1:] == ["error: record 40 is wrong"]
    assert re.match(r"read:  40%.* 40/100 \[", on_terminal(FAILING, 80)[0])


def test_a_pipe_gets_the_last_line_and_none_of_quick_inner_bars():
    message, train, read = in_pipe(NESTED)
    assert message.startswith("a message")
    assert re.fullmatch(r"train: 40/40 step \[00:\d\d<00:00, +[\d.]+ step/s, loss 0.5\]", train)
    assert re.fullmatch(r"read: 3 record \[00:\d\d, +[\d.]+ record/s\]", read)


def test_a_terminal_without_a_size_is_as_a_pipe():
    assert [line[:13] for line in on_terminal(NESTED, 80, rows=0)[1:]] == ["train: 40/40 ", "read: 3 recor"]


def test_a_pipe_gets_a_line_now_and_then():
    lines = [line for line in in_pipe(NESTED, every=0.1) if line.startswith("train")]
    steps = [int(re.match(r"train: (\d+)/40 step \[00:\d\d<00:\d\d, ", line)[1]) for line in lines]
    assert 3 <= len(steps) <= 8 and steps == sorted(set(steps)) and steps[-1] == 40
