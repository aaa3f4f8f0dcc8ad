"""Any image file to a small RGB image, or the reason why not.

    convert(path, size=96, encoding="jpg") -> bytes

    open -> limit of pixels -> decode first frame -> turn by EXIF -> RGB on white
      -> fit into a grey square, or shrink and keep the shape

The whole picture is kept, since captions speak of all of it. NOTE: the pixels are decoded before EXIF is
looked at: asking for EXIF first makes Pillow pass some broken files as good.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000
GREY = (128, 128, 128)
ENCODINGS = {"jpg": {"format": "JPEG", "quality": 92}, "png": {"format": "PNG"}}
BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    KeyError,
    IndexError,
    ZeroDivisionError,
    EOFError,
    MemoryError,
)


class ImageProblem(Exception):
    """An image that cannot be used; the message is the reason."""


def convert(path: Path, *, size: int, encoding: str, square: bool = True) -> bytes:
    """The image in a file, encoded: `size` x `size` pixels, or its own shape within them. Raises ImageProblem."""
    stream = io.BytesIO()
    change = fit if square else shrink
    change(load(path, size=size), size).save(stream, **ENCODINGS[encoding])
    return stream.getvalue()


def load(path: Path, *, size: int = 0) -> Image.Image:
    """The image in a file, upright and RGB. JPEGs much larger than `size` (0: never) are decoded reduced."""
    if not path.is_file():
        raise ImageProblem("missing_image")
    if not path.stat().st_size:
        raise ImageProblem("empty_image_file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # corrupt EXIF only warns; what cannot be used raises
        try:
            with Image.open(path) as image:
                return _upright_rgb(image, size)
        except Image.DecompressionBombError as error:
            raise ImageProblem("image_too_large") from error
        except BROKEN as error:
            raise ImageProblem("undecodable_image") from error


def _upright_rgb(image: Image.Image, size: int) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ImageProblem("image_too_large")
    if size:
        image.draft(None, (2 * size, 2 * size))  # JPEG only: decode at half, a quarter or an eighth of the size
    image.load()
    return to_rgb(_transposed(image))


def _transposed(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except BROKEN:
        return image  # the pixels are good, only the EXIF block is not


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any mode: transparency on white, 16 bits and floats scaled to 8."""
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
    """The image in its own shape, its longer side at most `size` pixels. A smaller one stays as it is."""
    return _scaled(image, size) if max(image.size) > size else image


def _scaled(image: Image.Image, size: int) -> Image.Image:
    """The image with a longer side of `size` pixels."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
