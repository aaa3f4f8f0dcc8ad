"""How an image is cut into the square tiles that the vision tower takes, and which of their features are kept.

    layout = Square(48)                          one tile: the whole image, resized
    layout = anyres(384)                         LLaDA-V's any-resolution tiling
    layout.tiles(image)                          (T, S, S, 3) uint8; resize="torch" is about four times as fast
    layout.num_tokens(image.size, side=27)       image tokens in the prompt; side: features along a tile's edge

AnyRes: choose the best grid of tiles -> resize the image into it, centred on black -> tile 0 is the whole image
squashed into a square, tiles 1.. are the grid row by row. The features of the black bars are dropped, and the others
shrunk if there are more than those of `max_tiles` tiles. Sizes are computed here; `VisionPath` packs the features.

Two bicubic antialiased resizes, which differ by one grey level here and there (a few values in a million by two): that
of Pillow is what the released models were trained with, torch's kernel for uint8 is what the loader uses unless
`data.resize` says otherwise.

T tiles, S pixels on a tile's side. Sizes of images and grids are (width, height), of features (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from src.io.errors import UserError
from src.io.images import by_pillow

Size = tuple[int, int]
RESIZES = ("torch", "pillow")
SLACK = 1.1  # features are shrunk only if their number exceeds the budget by more than the square of this


@dataclass(frozen=True)
class Square:
    """One tile of `size` x `size` pixels: the whole image, squashed."""

    size: int

    def __str__(self) -> str:
        return f"one tile of {self.size} pixels"

    def tiles(self, image: Image.Image, *, resize: str = "pillow", out: np.ndarray | None = None) -> np.ndarray:
        """(1, S, S, 3) uint8. out: an array of zeros to write into."""
        (whole,) = resized(image, [(self.size, self.size)], resize)
        if out is None:
            return whole[None]
        out[0] = whole
        return out

    def num_tiles(self, image_size: Size) -> int:
        return 1

    def num_tokens(self, image_size: Size, *, side: int) -> int:
        return side * side


@dataclass(frozen=True)
class AnyRes:
    """LLaDA-V's tiling for images of any shape and resolution."""

    size: int  # pixels on a tile's side
    grids: Sequence[Sequence[int]]  # (width, height) in pixels of the grids that an image may be fitted into
    max_tiles: int = 4  # roughly, keep at most the features of this many tiles (`anyres_max_4` in the released config)

    def __post_init__(self) -> None:
        for grid in self.grids:
            if len(grid) != 2 or any(side < 1 or side % self.size for side in grid):
                raise UserError(f"grids holds {list(grid)}, not a (width, height) in whole tiles of {self.size} pixels")
        object.__setattr__(self, "grids", tuple((width, height) for width, height in self.grids))

    def __str__(self) -> str:
        width, height = max(self.grids, key=math.prod)
        return f"tiles of {self.size} pixels in {len(self.grids)} grids up to {width} x {height}"

    def to_dict(self) -> dict:
        """The settings as a model folder stores them: `AnyRes(**settings)` is the same layout."""
        return {"size": self.size, "grids": [list(grid) for grid in self.grids], "max_tiles": self.max_tiles}

    def tiles(self, image: Image.Image, *, resize: str = "pillow", out: np.ndarray | None = None) -> np.ndarray:
        """(T, S, S, 3) uint8: the whole image squashed, then its grid row by row, aspect ratio kept, on black.

        out: an array of zeros to write into.
        """
        side, (columns, rows) = self.size, self.grid(image.size)
        tiles = np.zeros((1 + columns * rows, side, side, 3), dtype=np.uint8) if out is None else out
        width, height = columns * side, rows * side
        across, down = width / image.width, height / image.height
        if across < down:
            inner = width, min(math.ceil(image.height * across), height)
        else:
            inner = min(math.ceil(image.width * down), width), height
        left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
        tiles[0], fitted = resized(image, [(side, side), inner], resize)
        for number, tile in enumerate(tiles[1:]):
            x, y = side * (number % columns) - left, side * (number // columns) - top  # of the tile in `fitted`
            part = fitted[max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)]
            down_from, right_from = max(-y, 0), max(-x, 0)
            tile[down_from : down_from + part.shape[0], right_from : right_from + part.shape[1]] = part
        return tiles

    def grid(self, image_size: Size) -> Size:
        """(columns, rows) in tiles of the grid that keeps most of the resolution; among equal ones, wastes least."""
        width, height = min(self.grids, key=lambda grid: _cost(image_size, (grid[0], grid[1])))
        return width // self.size, height // self.size

    def num_tiles(self, image_size: Size) -> int:
        columns, rows = self.grid(image_size)
        return 1 + columns * rows

    def num_tokens(self, image_size: Size, *, side: int) -> int:
        """Tokens of the whole image, then those of each feature row, each row with its newline."""
        height, width = self.final(image_size, side=side)
        return side * side + height * (width + 1)

    def unpadded(self, image_size: Size, *, side: int) -> tuple[slice, slice]:
        """The rows and columns of the grid's features that show the image, not the black bars."""
        columns, rows = self.grid(image_size)
        width, height = columns * side, rows * side
        if image_size[0] / image_size[1] > width / height:
            return _middle(height, int(image_size[1] * (width / image_size[0]))), slice(0, width)
        return slice(0, height), _middle(width, int(image_size[0] * (height / image_size[1])))

    def final(self, image_size: Size, *, side: int) -> Size:
        """(height, width) of the grid's features that are kept: without the bars, and shrunk if there are too many."""
        rows, columns = self.unpadded(image_size, side=side)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        ratio = math.sqrt(height * width / (self.max_tiles * side**2))
        return (max(1, int(height // ratio)), max(1, int(width // ratio))) if ratio > SLACK else (height, width)


Layout = Square | AnyRes


def check_layout(data: Layout, model: Layout | None) -> None:
    """Raises UserError if the data cut images into other tiles than the model takes."""
    if model is None:
        raise UserError("the data have images (data.image_size), but the model has no vision path (model.vision)")
    # `max_tiles` is left out: it only affects the model's features
    if (data.size, getattr(data, "grids", None)) != (model.size, getattr(model, "grids", None)):
        remedy = f"; set data.image_size={model.size}" if type(data) is type(model) and data.size != model.size else ""
        raise UserError(
            f"the data and the model cut images in different ways: data.image_size and data.tiling mean {data}, model "
            f"means {model}{remedy}"
        )


def anyres(size: int, *, columns: int = 6, rows: int = 6, max_tiles: int = 4) -> AnyRes:
    """All grids of up to `columns` x `rows` tiles of `size` pixels; `anyres(384)` is the released LLaDA-V's layout."""
    grids = [(size * column, size * row) for column in range(1, columns + 1) for row in range(1, rows + 1)]
    return AnyRes(size, grids, max_tiles)


def _cost(image_size: Size, grid: Size) -> tuple[int, int]:
    """What to minimise: minus the kept pixels of the image, then the unused pixels of the grid."""
    scale = min(grid[0] / image_size[0], grid[1] / image_size[1])
    fitted = int(image_size[0] * scale) * int(image_size[1] * scale)
    kept = min(fitted, image_size[0] * image_size[1])
    return -kept, grid[0] * grid[1] - kept


def _middle(length: int, kept: int) -> slice:
    """The middle `kept` of `length` positions, or one more: both sides lose equally many. At least one is kept, also
    of an image of 1 x 4000 pixels, for which the released code keeps none."""
    cut = (length - max(kept, 1)) // 2
    return slice(cut, length - cut)


def resized(image: Image.Image, sizes: Sequence[Size], resize: str) -> list[np.ndarray]:
    """The image at each size, (H, W, 3) uint8 arrays that may be read-only; resize: torch or pillow.

    Raises ValueError unless the image is RGB: conversion to RGB is the caller's decision.
    """
    if image.mode != "RGB":
        raise ValueError(f"tiles are cut from RGB images, got mode {image.mode!r}")
    if resize == "pillow":
        return [
            np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)) for size in sizes
        ]
    pixels = np.asarray(image)
    # (1, 3, H, W) in the memory order of the image, for which torch has a vectorised kernel; from_numpy would warn
    # that the array is read-only
    tensor = torch.from_dlpack(pixels)[None].permute(0, 3, 1, 2)
    arrays = []
    for width, height in sizes:
        output = tensor
        # both round between the two directions, so their order matters: Pillow 13 begins with the height in this case
        if image.height - height > max(0, 2 * (image.width - width)):
            output = F.interpolate(output, size=(height, image.width), mode="bicubic", antialias=True)
        if output.shape[2:] != (height, width):
            output = F.interpolate(output, size=(height, width), mode="bicubic", antialias=True)
        arrays.append(output[0].permute(1, 2, 0).numpy())
    return arrays


def resizer(resize: str) -> Callable[[Image.Image, Size], Image.Image]:
    """torch's resize of one image to (width, height) as `src.io.images.convert` takes it, or Pillow's."""
    if resize == "pillow":
        return by_pillow
    return lambda image, size: Image.fromarray(resized(image, [size], resize)[0])
