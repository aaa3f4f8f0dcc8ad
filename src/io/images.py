"""Convert any image file, or its bytes, to a small RGB image.

    convert(path, size=96, encoding="jpg") -> bytes

    open -> pixel limit -> decode first frame -> rotate by EXIF -> RGB on white
      -> fit into a grey square, or shrink and keep the aspect ratio

Images are never cropped, as captions describe all of them. NOTE: pixels are decoded before EXIF is read: with EXIF
first, Pillow accepts some broken files.

Callers pass the function that resizes (`src.models.tiling.resizer`), as this room does without torch; Pillow's is the
default.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000
GREY = (128, 128, 128)
ENCODINGS = {"jpg": {"format": "JPEG", "quality": 92}, "png": {"format": "PNG"}}
BROKEN = (
    *(OSError, ValueError, SyntaxError, TypeError, LookupError, ZeroDivisionError, EOFError, MemoryError),
    *(RuntimeError, struct.error),
)
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
Resize = Callable[[Image.Image, tuple[int, int]], Image.Image]  # of an RGB image to (width, height)


class ImageProblem(Exception):
    """An image that cannot be used. The message is the reason, a word for counts."""


def by_pillow(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bicubic; images much larger than `size` are first reduced by a whole factor."""
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def convert(
    source: Path | bytes, *, size: int, encoding: str, square: bool = True, resize: Resize = by_pillow
) -> bytes:
    """The re-encoded image: a square of `size` pixels, or its own aspect ratio within it."""
    stream = io.BytesIO()
    fitted = fit if square else shrink
    fitted(load(source, size=size), size, resize=resize).save(stream, **ENCODINGS[encoding])
    return stream.getvalue()


def load(
    source: Path | bytes, *, size: int = 0, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Decode an image file, or the bytes of one: its first frame, upright and as RGB.

    size: JPEGs much larger than this (0: none) are decoded at reduced size
    formats: Pillow's names of those to read, for images of strangers; None: all that are installed
    Raises ImageProblem, before pixels are decoded where there are more than `max_pixels`.
    """
    if isinstance(source, Path) and not source.is_file():
        raise ImageProblem("missing_image")
    if not (len(source) if isinstance(source, bytes) else source.stat().st_size):
        raise ImageProblem("empty_image_file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for corrupt EXIF; unusable images raise
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
                if image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError
                if size:
                    image.draft(None, (2 * size, 2 * size))  # JPEG only: decode at half, a quarter or an eighth
                image.load()
                with suppress(*BROKEN):  # the pixels are intact even where the EXIF block is broken
                    ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image, tags=getattr(image, "tag_v2", {}))
        except Image.DecompressionBombError as error:
            raise ImageProblem("image_too_large") from error
        except BROKEN as error:
            raise ImageProblem("undecodable_image") from error


def to_rgb(image: Image.Image, *, tags: Mapping[int, Any]) -> Image.Image:
    """Convert any mode to RGB, transparency on white. tags: those of a TIFF file. An RGB image is returned itself."""
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image, tags)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert copies


def _to_8_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """A grey image of 16 or 32 bits or of floats, as bright as it looks.

    White is the greatest value of the type. Files use floats and 32 bits in several ranges: the smallest that holds
    the values is taken.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    bits, signed = tags.get(BITS, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0] == 2
    if image.mode != "F" and bits <= 16:
        white = 2.0 ** (bits - signed) - 1
    else:
        brightest = float(values.max(initial=0.0))
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0, 2.0**31 - 1)
        white = next((end for end in ranges if brightest <= 1.5 * end), brightest)  # resizing overshoots
    grey = np.clip(values * (255 / white), 0, 255).round().astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def fit(image: Image.Image, size: int, *, resize: Resize = by_pillow) -> Image.Image:
    """The whole image, its longer side `size` pixels, centred on a grey square."""
    small = _scaled(image, size, resize)
    square = Image.new("RGB", (size, size), GREY)
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square


def shrink(image: Image.Image, size: int, *, resize: Resize = by_pillow) -> Image.Image:
    """The image with its longer side at most `size` pixels, in its own aspect ratio. Smaller images stay unchanged."""
    return _scaled(image, size, resize) if max(image.size) > size else image


def _scaled(image: Image.Image, size: int, resize: Resize) -> Image.Image:
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image if (width, height) == image.size else resize(image, (width, height))
