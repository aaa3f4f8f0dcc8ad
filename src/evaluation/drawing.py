"""Text in boxes, drawn with PIL: captions with coloured words for reports, and tokens for TensorBoard.

placed = layout(pieces, width=300, size=13)      wraps the pieces into lines
paint(draw, placed, at=(10, 10), size=13)        draws them, placed.height pixels high
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
INK: Colour = (30, 30, 30)


@dataclass(frozen=True)
class Piece:
    """A word or token, its ink, and the fill and edge of the box behind it (None: no box, no edge).

    The box of a `wide` piece extends to the next piece if both have the same fill, so a marked sentence is one band.
    """

    text: str
    ink: Colour = INK
    fill: Colour | None = None
    edge: Colour | None = None
    wide: bool = False


@dataclass(frozen=True)
class Placed:
    """Pieces with their boxes (left, top, right, bottom), relative to the top left corner, and the total height."""

    pieces: list[tuple[Piece, tuple[int, int, int, int]]]
    height: int


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """PIL's own font."""
    return ImageFont.load_default(size=size)


def layout(pieces: Sequence[Piece], *, width: int, size: int, gap: int = 4) -> Placed:
    """Wrap pieces, `gap` pixels apart, into lines of `width` pixels; a piece that is too wide gets its own line."""
    step = round(size * 1.45)
    placed: list[tuple[Piece, tuple[int, int, int, int]]] = []
    x = y = 0
    for piece in pieces:
        length = round(font(size).getlength(piece.text))
        if x and x + length > width:
            x, y = 0, y + step
        elif x and placed[-1][0].wide and placed[-1][0].fill == piece.fill:
            previous, box = placed[-1]
            placed[-1] = previous, (box[0], box[1], x, box[3])
        placed.append((piece, (x, y, x + length, y + step - 2)))
        x += length + gap
    return Placed(placed, y + step if placed else 0)


def paint(draw: ImageDraw.ImageDraw, placed: Placed, *, at: tuple[int, int], size: int) -> None:
    """Draw a layout with its top left corner at `at`."""
    dx, dy = at
    for piece, (left, top, right, bottom) in placed.pieces:
        box = (dx + left - 1, dy + top, dx + right, dy + bottom)
        if piece.fill or piece.edge:
            draw.rectangle(box, fill=piece.fill, outline=piece.edge)
    for piece, (left, top, _, bottom) in placed.pieces:
        place = (dx + left, dy + (top + bottom) // 2)
        draw.text(place, piece.text, fill=piece.ink, font=font(size), anchor="lm")


def enlarge(image: Image.Image, *, side: int) -> Image.Image:
    """The image resized to a longer side of `side` pixels; a small one keeps its pixels as sharp squares."""
    scale = side / max(image.size)
    width, height = (max(1, round(n * scale)) for n in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
