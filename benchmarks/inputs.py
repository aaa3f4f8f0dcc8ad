"""What the benchmarks of the data path read, made from seeds: photographs, captions, and commands that prepare them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = "a red ring near the blue cross on grey stone under two small green boxes and an old round tower"


def photo(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG of smooth random colours with some noise, at about the bytes per pixel of a photograph."""
    rng, (width, height) = np.random.default_rng(seed), size
    coarse = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    smooth = resized(Image.fromarray(coarse), size)
    values = np.asarray(smooth, dtype=np.float64) + rng.normal(0, 4, (height, width, 3))
    stream = io.BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_images(folder: Path, count: int, size: tuple[int, int], *, distinct: int = 200) -> list[tuple[int, str]]:
    """(number, name) of `count` image files of `distinct` contents, in folders of 1000."""
    contents, names = [photo(n, size) for n in range(min(count, distinct))], []
    for number in range(count):
        name = f"{number // 1000:04d}/{number:09d}.jpg"
        file = folder / "images" / name
        if not number % 1000:
            file.parent.mkdir(parents=True)
        file.write_bytes(contents[number % len(contents)])
        names.append((number, name))
    return names


def caption(seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS.split(), 20)).capitalize() + "."


def write_rows(path: Path, images: Iterable[tuple[int, str]], prompts: Sequence[str]) -> Path:
    """A file of records: every image under every prompt."""
    with path.open("w") as file:
        for number, name in images:
            for prompt in prompts:
                file.write(json.dumps({"image": name, "prompt": prompt, "caption": caption(number)}) + "\n")
    return path


def record(key: str, seed: int) -> dict:
    return {"key": key, "prompt": "Describe the picture.", "captions": [{"text": caption(seed), "swaps": []}]}


def opened(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC)


def prepare_command(annotations: Path, out: Path, *, size: int, processes: int | None = None) -> list[str]:
    """The images lie in `images` beside the annotations."""
    settings = {"out": out, "images": annotations.parent / "images", "annotations": annotations, "image_size": size}
    settings |= {"vocab_size": 400, **({"processes": processes} if processes else {})}
    return [sys.executable, "-m", "src.prepare", "conf=photos", *(f"prepare.{k}={v}" for k, v in settings.items())]
