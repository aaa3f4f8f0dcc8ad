"""Convert any image file to a small RGB image.

    convert(path, size=96, encoding="jpg") -> bytes

    open -> pixel limit -> decode first frame -> rotate by EXIF -> RGB on white
      -> fit into a grey square, or shrink and keep the aspect ratio

Images are never cropped, as captions describe all of them. NOTE: pixels are decoded before EXIF is read: with EXIF
first, Pillow accepts some broken files.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000
GREY = (128, 128, 128)
ENCODINGS = {"jpg": {"format": "JPEG", "quality": 92}, "png": {"format": "PNG"}}
BROKEN = (OSError, ValueError, SyntaxError, TypeError, LookupError, ZeroDivisionError, EOFError, MemoryError)


class ImageProblem(Exception):
    """An image that cannot be used. The message is the reason, a word for counts."""


def convert(path: Path, *, size: int, encoding: str, square: bool = True) -> bytes:
    """The re-encoded image: a square of `size` pixels, or its own aspect ratio within it."""
    stream = io.BytesIO()
    resize = fit if square else shrink
    resize(load(path, size=size), size).save(stream, **ENCODINGS[encoding])
    return stream.getvalue()


def load(path: Path, *, size: int = 0) -> Image.Image:
    """Read an image file, upright and as RGB. JPEGs much larger than `size` (0: none) are decoded at reduced size."""
    if not path.is_file():
        raise ImageProblem("missing_image")
    if not path.stat().st_size:
        raise ImageProblem("empty_image_file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for corrupt EXIF; unusable images raise
        try:
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if size:
                    image.draft(None, (2 * size, 2 * size))  # JPEG only: decode at half, a quarter or an eighth
                image.load()
                upright: Image.Image = image
                with suppress(*BROKEN):  # the pixels are intact even where the EXIF block is broken
                    upright = ImageOps.exif_transpose(image)
                return to_rgb(upright)
        except Image.DecompressionBombError as error:
            raise ImageProblem("image_too_large") from error
        except BROKEN as error:
            raise ImageProblem("undecodable_image") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: transparency on white, 16-bit and float values scaled to 8 bits."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        scale = 255 / 65535 if values.size and values.max() > 255 else 1.0
        image = Image.fromarray(np.clip(values * scale, 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, size: int) -> Image.Image:
    """The whole image, its longer side `size` pixels, centred on a grey square."""
    small = _scaled(image, size)
    square = Image.new("RGB", (size, size), GREY)
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square


def shrink(image: Image.Image, size: int) -> Image.Image:
    """The image with its longer side at most `size` pixels, in its own aspect ratio. Smaller images stay unchanged."""
    return _scaled(image, size) if max(image.size) > size else image


def _scaled(image: Image.Image, size: int) -> Image.Image:
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
