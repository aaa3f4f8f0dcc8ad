"""Read JSON files of any size in pieces, with the decoder of the `json` module: memory holds one value at a time.

    text = JsonText(open_text(Path("captions.json")))
    for record in text.elements(): ...       of the list that starts here

Why not ijson: its yajl parser turns half of a surrogate pair into a question mark, which would be trained, and one byte
that is not UTF-8 ends the whole file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from src.io.errors import UserError
from src.preparation.counts import Skip

PIECE = 1 << 18  # characters
NOT_BLANK = re.compile(r"[^\s\ufeff]")
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # a byte as `surrogateescape` decodes it
MESSAGE = 16  # characters: an error so near to the end may come from what is not read yet


def open_text(path: Path) -> TextIO:
    """A UTF-8 file with any line ends. A byte that is not UTF-8 becomes a character that `NOT_UTF8` finds."""
    with path.open("rb") as stream:
        if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path} is UTF-16; save it as UTF-8")
    return path.open(encoding="utf-8-sig", errors="surrogateescape")


class JsonText:
    """A position in a JSON text. line: of the position. Methods raise ValueError or RecursionError for broken JSON."""

    def __init__(self, stream: TextIO) -> None:
        self.line = 1
        self._stream, self._text, self._at = stream, "", 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while not (match := NOT_BLANK.search(self._text, self._at)):
            self._go_to(len(self._text))
            if not self._more():
                return ""
        self._go_to(match.start())
        return self._text[self._at]

    def value(self) -> Any:
        """The next value; a `Skip` if it holds a byte that is not UTF-8."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(self._text) - MESSAGE or error.msg.startswith("Unterminated string")
                if not (is_cut and self._more()):
                    raise
            else:
                if end + 2 < len(self._text) or not self._more():  # a number may go on, as 1 in 1e+7
                    break
        raw = self._text[self._at : end]
        self._go_to(end)
        return value if raw.isascii() or not NOT_UTF8.search(raw) else Skip("not_utf-8")

    def elements(self) -> Iterator[Any]:
        """The values of the list that comes next."""
        self._take("[")
        if self.peek() != "]":
            yield self.value()
            while self.peek() == ",":
                self._take(",")
                yield self.value()
        self._take("]")

    def pairs(self) -> Iterator[tuple[str, Any, bool]]:
        """(key, value, False) of the object that comes next; (key, element, True) for each element of a list in it."""
        self._take("{")
        while self.peek() != "}":
            if not isinstance(key := self.value(), str | Skip):
                raise ValueError("a key that is no string")
            self._take(":")
            values = ((value, True) for value in self.elements()) if self.peek() == "[" else [(self.value(), False)]
            for value, is_element in values:
                yield (key, value, is_element) if isinstance(key, str) else ("", key, False)
            if self.peek() == ",":
                self._take(",")
            elif self.peek() != "}":
                raise ValueError("expected a comma or }")
        self._take("}")

    def skip_line(self) -> str:
        """Go to the next line. Returns the reason why this one is left out."""
        reason = "broken_json"
        while True:
            end = self._text.find("\n", self._at)
            if NOT_UTF8.search(self._text, self._at, end if end >= 0 else len(self._text)):
                reason = "not_utf-8"
            self._go_to(end if end >= 0 else len(self._text))
            if end >= 0 or not self._more():
                return reason

    def _take(self, character: str) -> None:
        if (found := self.peek()) != character:
            raise ValueError(f"expected {character}, got {found or 'the end of the file'}")
        self._go_to(self._at + 1)

    def _go_to(self, position: int) -> None:
        self.line += self._text.count("\n", self._at, position)
        self._at = position

    def _more(self) -> bool:
        """Read as much again as is held, so that one long value takes linear time. False at the end of the file."""
        if piece := self._stream.read(max(PIECE, len(self._text) - self._at)):
            self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)
