"""Text in boxes, drawn with PIL: captions with coloured words for reports, and tokens for TensorBoard.

text_box(pieces, width=300)         pieces in lines, as an image that is as high as it has to be
sheet([[image, box, box], ...])     images in a grid
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torchmetrics import Metric

from src.evaluation.results import Cell
from src.io.words import counted
from src.metrics.caption import CaptionMetric, Mark
from src.types import Batch

Colour = tuple[int, int, int]
INK: Colour = (30, 30, 30)
FILL: dict[str, Colour] = {"ungrammatical": (255, 226, 150), "false": (250, 190, 190)}
MEANING = {"false": "contradicts the image", "ungrammatical": "not a sentence of the grammar"}
SIDE, PAD = 150, 14  # pixels: longer side of an image, space around the parts of a sheet


class Piece(NamedTuple):
    """A word or token, and the fill and edge of the box behind it (None: no box, no edge)."""

    text: str
    ink: Colour = INK
    fill: Colour | None = None
    edge: Colour | None = None


def text_box(pieces: Sequence[Piece], *, width: int, size: int = 14, gap: int = 0) -> Image.Image:
    """Pieces, `gap` pixels apart, in lines of `width` pixels."""
    font, step = ImageFont.load_default(size=size), round(size * 1.45)
    box = Image.new("RGB", (width, step * (len(pieces) + 1)), "white")
    draw, x, y = ImageDraw.Draw(box), 0, 0
    for piece in pieces:
        length = round(font.getlength(piece.text))
        if x and x + length > width:
            x, y = 0, y + step
        if not x and piece.text.isspace():
            continue
        if piece.fill or piece.edge:
            draw.rectangle((x, y, x + length - 1, y + step - 3), fill=piece.fill, outline=piece.edge)
        draw.text((x, y + step // 2 - 1), piece.text, fill=piece.ink, font=font, anchor="lm")
        x += length + gap
    return box.crop((0, 0, width, y + step))


def sheet(rows: Sequence[Sequence[Image.Image]], *, pad: int = PAD) -> Image.Image:
    """Images in a grid: columns as wide as their widest image, rows as high as their highest one."""
    widths = [max(image.width for image in column) for column in zip(*rows, strict=True)]
    heights = [max(image.height for image in row) for row in rows]
    size = (pad + sum(widths) + pad * len(widths), pad + sum(heights) + pad * len(heights))
    grid, top = Image.new("RGB", size, "white"), pad
    for row, height in zip(rows, heights, strict=True):
        left = pad
        for image, width in zip(row, widths, strict=True):
            grid.paste(image, (left, top))
            left += width + pad
        top += height + pad
    return grid


def enlarge(data: bytes, *, side: int = SIDE) -> Image.Image:
    """An encoded image, resized to a longer side of `side` pixels; a small one keeps its pixels as sharp squares."""
    image = Image.open(BytesIO(data)).convert("RGB")
    scale = side / max(image.size)
    width, height = (max(1, round(n * scale)) for n in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


def marked_text(text: str, marks: Sequence[Mark]) -> list[Piece]:
    """The words of a caption and the spaces between them, with the flaws in colour."""
    if not text.strip():
        return [Piece("(empty)", ink=(140, 140, 140))]
    pieces = []
    for match in re.finditer(r"\s+|\S+", text):
        mark = next((mark for mark in marks if mark.start < match.end() and match.start() < mark.end), None)
        pieces.append(Piece(" " if match[0].isspace() else match[0], fill=FILL[mark.flaw] if mark else None))
    return pieces


def draw_examples(captions: Mapping[Cell, list[dict]], metrics: Sequence[Metric], examples: Batch) -> Image.Image:
    """The first images with their captions at the highest tokens/step, flaws in colour; a legend names the colours."""
    # 1. Columns: the baseline, and the last method with its first and its last sampler.
    speed = max(cell.tokens_per_step for cell in captions)
    fastest = [cell for cell in captions if cell.tokens_per_step == speed]
    last_method = [cell for cell in fastest if cell.method == fastest[-1].method]
    shown = list(dict.fromkeys([fastest[0], last_method[0], last_method[-1]]))
    blank, width, flaws = Image.new("RGB", (1, 1), "white"), 310, set()
    titles = [f"{cell.method}, {cell.sampler}, {counted(cell.tokens_per_step, 'token')}/step" for cell in shown]
    rows = [[blank, *(text_box([Piece(title)], width=width) for title in titles)]]
    # 2. One row for each image.
    marking = [metric for metric in metrics if isinstance(metric, CaptionMetric)]
    for number, (record, image) in enumerate(zip(examples.records, examples.images, strict=True)):
        boxes = []
        for cell in shown:
            text = captions[cell][number]["text"]
            marks = [mark for metric in marking for mark in metric.marks(text, record)]
            boxes.append(text_box(marked_text(text, marks), width=width))
            flaws |= {mark.flaw for mark in marks}
        rows.append([enlarge(image), *boxes])
    # 3. Legend.
    legend = [Piece(meaning, fill=FILL[flaw]) for flaw, meaning in MEANING.items() if flaw in flaws]
    return sheet([*rows, [blank, text_box(legend, width=width, gap=24), *[blank] * (len(shown) - 1)]])
