"""Speed and scale of the data path, side by side in one run; prints ratios.

    python -m benchmarks.data                             all parts, some ten minutes
    python -m benchmarks.data --only images               one of them
    python -m benchmarks.data --only resize --photos DIR  with photographs of your own
    python -m benchmarks.data --scale 260000              prepare and stream as many small records: time, bytes, memory
    python -m benchmarks.data --scale 260000 --kills 3    prepare them, killed at three random moments and continued

images   JPEGs of 640 x 480 to squares of 384 pixels, and to five tiles: the loader's code against plain Pillow (open,
         convert, bicubic resize, array)
resize   the share of values in which torch's resize and Pillow's differ
loader   an epoch of shards whose images are stored at 384 pixels, against tarfile and Pillow's decoding alone; what the
         loader spends on tokenisation is shown apart
padding  the share of padding in the prefixes of batches, by `data.bucket`
prepare  the whole command with 1 and with 2 processes, which needs two idle cores; and the rate after the start
large    what 100 million samples on 64 nodes take, computed from an index of 200,000

images and loader run on one core in this process, in turn, and count its CPU time. All inputs are made from seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.at_scale import kills, large, scale, stream
from benchmarks.inputs import WORDS, opened, photo, prepare_command, record, resized, write_images, write_rows
from benchmarks.turns import in_turn
from datamodules.captions import CaptionData
from datamodules.collate import caption_row, image_inputs, image_tokens
from datamodules.shards import Sample, decode
from src.io.shards import INDEX, write_shards
from src.models import tiling
from src.models.tiling import Square, anyres
from src.text.tokenizer import Codec

SIZE, LARGE = 384, (640, 480)
# spec of real data: quantiles of the words of GSM8K's questions, and of width / height of COCO's photographs
QUESTIONS = {0: 10, 0.05: 23, 0.25: 33, 0.5: 42, 0.75: 54, 0.95: 79, 0.99: 100, 1: 183}
RATIOS = {0: 0.38, 0.5: 1.33, 1: 3.9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="default: all of them")
    for name, default in {"runs": 7, "images": 2000, "samples": 1000, "scale": 0, "kills": 0, "workers": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs, for `resize`")
    parser.add_argument("--stream", type=Path, help="read an epoch of this folder; used by the benchmark itself")
    parser.set_defaults(device="cpu", threads=1)  # for `in_turn`
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.stream:
        return stream(options.stream, options.workers)
    with tempfile.TemporaryDirectory() as temporary:
        if options.kills:
            return kills(Path(temporary), options.scale, options.kills)
        if options.scale:
            return scale(Path(temporary), options.scale, options.workers)
        for name in [options.only] if options.only else PARTS:
            PARTS[name](Path(temporary) / name, options)
    return None


def compare_images(_: Path, options: argparse.Namespace) -> None:
    photos = [photo(number, LARGE) for number in range(16)]
    tiling = anyres(SIZE, columns=2, rows=2)  # five tiles of an image of this size

    def ours(layout) -> np.ndarray:
        samples = [decode({"__key__": "a", "json": b"{}", "jpg": data}) for data in photos]
        images = [[sample.image] for sample in samples if sample and sample.image]
        return image_inputs(images, layout, resize="torch")["pixel_values"].numpy()

    def plain_square() -> list[np.ndarray]:
        return [np.asarray(resized(opened(data), (SIZE, SIZE)))[None] for data in photos]

    def plain_tiles() -> list[np.ndarray]:
        batch = []
        for data in photos:
            image, grid = opened(data), Image.new("RGB", (2 * SIZE, 2 * SIZE))
            grid.paste(resized(image, (768, 576)), (0, 96))
            boxes = [(x, y, x + SIZE, y + SIZE) for y in (0, SIZE) for x in (0, SIZE)]
            batch.append(
                np.stack([np.asarray(tile) for tile in (resized(image, (SIZE, SIZE)), *map(grid.crop, boxes))])
            )
        return batch

    for title, layout, plain in (("square", Square(SIZE), plain_square), ("five tiles", tiling, plain_tiles)):
        difference = np.abs(np.stack(plain()).astype(int) - ours(layout).transpose(0, 1, 3, 4, 2))
        if difference.max() > 2 or difference.mean() > 0.01:
            sys.exit(f"{title}: the two sides make different pixels")
        seconds = in_turn({"plain": plain, "ours": lambda layout=layout: ours(layout)}, options)
        medians = {name: statistics.median(values) / len(photos) for name, values in seconds.items()}
        show(f"images, {title}", medians, "plain", "ours")


def compare_resize(_: Path, options: argparse.Namespace) -> None:
    """Off by one, by two, and by more, of all values."""
    rng = np.random.default_rng(0)
    photos = [opened(file.read_bytes()) for file in sorted((options.photos or Path("none")).rglob("*.jpg"))[:60]]
    made = [opened(photo(number, LARGE)) for number in range(20)]
    noise = [rng.integers(0, 256, (480, 640, 3), dtype=np.uint8) for _ in range(20)]
    black_white = [Image.fromarray((values > 127) * np.uint8(255)) for values in noise]
    noises = [Image.fromarray(values) for values in noise]
    for title, images in {"photographs": photos, "made": made, "noise": noises, "0 and 255": black_white}.items():
        for size in ((48, 48), (96, 96), (SIZE, SIZE), (768, 576), (1536, 1152)) if images else ():
            counts = np.zeros(256, np.int64)
            for image in images:
                (ours,), (pillow,) = (tiling.resized(image, [size], name) for name in ("torch", "pillow"))
                counts += np.bincount(np.abs(ours.astype(int) - pillow).ravel(), minlength=256)
            one, two, more = (counts[low:high].sum() / counts.sum() for low, high in ((1, 2), (2, 3), (3, 256)))
            sys.stdout.write(
                f"resize, {title} to {size[0]} x {size[1]}: off by one {one:.2%}, by two {two * 1e6:.1f} in a million, "
                f"by more {more * 1e6:.1f}\n"
            )


def compare_loader(folder: Path, options: argparse.Namespace) -> None:
    count = 512
    codec = Codec.train([WORDS], vocab_size=400)
    samples = ({"__key__": f"k{n}", "json": record(f"k{n}", n), "jpg": photo(n, (SIZE, SIZE))} for n in range(count))
    common: dict[str, Any] = {"prefix": "train", "per_shard": 128, "kind": "captions", "tokenizer": codec.fingerprint}
    index = write_shards(folder / "train", samples, **common)
    data = CaptionData(path=str(folder), codec=codec, batch_size=32, response_length=64, image_size=SIZE)
    read = [decode(raw) for name in index["shards"] for raw in members(folder / "train" / name["name"])]

    def loader() -> int:
        return sum(len(batch) for batch in data.train_dataloader())

    def plain() -> int:
        names = [folder / "train" / shard["name"] for shard in index["shards"]]
        return sum(np.asarray(opened(raw["jpg"])).shape[-1] // 3 for name in names for raw in members(name))

    def tokenise() -> int:
        return sum(tokens(data, sample) for sample in read if sample)

    if (loader(), plain()) != (count, count):
        sys.exit("the two sides read different samples")
    seconds = in_turn({"plain": plain, "loader": loader, "tokenisation": tokenise}, options)
    medians = {name: statistics.median(values) / count for name, values in seconds.items()}
    medians["the rest"] = medians["loader"] - medians["tokenisation"]
    show("loader, stored at 384", medians, "plain", "the rest")


def compare_padding(folder: Path, options: argparse.Namespace) -> None:
    """Prompts and image sizes as in real data stand in the index; the images themselves are of 8 pixels."""
    count, rng, codec = options.samples, np.random.default_rng(0), Codec.train([WORDS], vocab_size=400)
    drawn = lambda quantiles: np.interp(rng.random(count), list(quantiles), list(quantiles.values()))  # noqa: E731
    prompts, ratios, image = drawn(QUESTIONS).astype(int).tolist(), drawn(RATIOS), photo(0, (8, 8))
    sizes = np.stack([np.minimum(640, 640 * ratios), np.minimum(640, 640 / ratios)], 1).astype(int).tolist()
    samples = ({"__key__": f"{n:06d}", "json": record(f"{n:06d}", n), "jpg": image} for n in range(count))
    common: dict[str, Any] = {"prefix": "train", "per_shard": 500, "kind": "captions", "tokenizer": codec.fingerprint}
    index, done = write_shards(folder / "train", samples, **common), 0
    for shard in index["shards"]:
        own = slice(done, done := done + shard["count"])
        shard |= {"prompt_tokens": prompts[own], "sizes": sizes[own]}
    (folder / "train" / INDEX).write_text(json.dumps(index))
    for title, layout in {"any-resolution": anyres(SIZE), "one tile": None}.items():
        tokens = [image_tokens(layout or Square(SIZE), *size) for size in sizes]
        lengths = {f"{n:06d}": prompts[n] + tokens[n] for n in range(count)}
        for rows in (4, 16):
            shares = []
            for bucket in (None, 4, 8, 16):
                settings = {"batch_size": rows, "response_length": 64, "image_size": SIZE, "tiling": layout}
                data = CaptionData(path=str(folder), codec=codec, bucket=bucket, **settings)
                of = [[lengths[key] for key in batch.keys] for batch in data.train_dataloader()]
                padded = sum(max(batch) * len(batch) for batch in of)
                shares.append(f"bucket {bucket}: {1 - sum(map(sum, of)) / padded:.1%}")
            sys.stdout.write(f"padding, {title}, batch {rows}: {', '.join(shares)}\n")
            sys.stdout.flush()


def compare_prepare(folder: Path, options: argparse.Namespace) -> None:
    """Every image under several prompts. The rate after the start is the slope between a quarter of them and all."""
    images = write_images(folder, options.images, LARGE)
    prompts = [f"Describe it, way {number}." for number in range(6)]
    files = [write_rows(folder / f"{n}.jsonl", images[:n], prompts) for n in (len(images) // 4, len(images))]
    few, many = (len(prompts) * n for n in (len(images) // 4, len(images)))
    seconds: dict[tuple[Path, int], list[float]] = defaultdict(list)
    for run in range(2):
        for processes in (1, 2):
            for file in files:
                command = prepare_command(
                    file, folder / f"{run}-{processes}-{file.stem}", size=SIZE, processes=processes
                )
                began = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                seconds[file, processes].append(time.perf_counter() - began)
    least = {key: min(values) for key, values in seconds.items()}
    whole = {f"{n} processes": least[files[1], n] / many for n in (1, 2)}
    slope = {f"{n} processes": (least[files[1], n] - least[files[0], n]) / (many - few) for n in (1, 2)}
    show(f"prepare, 640 x 480 to 384, {many} samples, whole process", whole, "1 processes", "2 processes")
    show("prepare, after the start", slope, "1 processes", "2 processes")


PARTS: Mapping[str, Callable[[Path, argparse.Namespace], None]] = {
    "images": compare_images,
    "resize": compare_resize,
    "loader": compare_loader,
    "padding": compare_padding,
    "prepare": compare_prepare,
    "large": lambda _, options: large(),
}


def show(title: str, seconds: dict[str, float], slow: str, fast: str) -> None:
    """seconds: per sample."""
    parts = ", ".join(f"{name} {value * 1e3:.2f} ms = {1 / value:.0f}/s" for name, value in seconds.items())
    sys.stdout.write(f"{title}: {parts}; {fast} is {seconds[slow] / seconds[fast]:.2f} x as fast as {slow}\n")
    sys.stdout.flush()


def members(path: Path) -> Iterator[dict]:
    """The samples of a tar, by the standard library."""
    sample: dict = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            if sample and key != sample["__key__"]:
                yield sample
                sample = {}
            file = tar.extractfile(member)
            sample |= {"__key__": key, name: file.read() if file else b""}
    yield sample


def tokens(data: CaptionData, sample: Sample) -> int:
    """What the loader tokenises of a sample: all captions when it is checked, then its prompt and one caption."""
    data.collate.misfit(sample)
    row = caption_row(sample.record["captions"][0], data.codec)
    return len(data.collate.prompt_ids(sample)) + len(row.response)


if __name__ == "__main__":
    main()
