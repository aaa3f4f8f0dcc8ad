"""Speed and scale of the data path, side by side in one run; prints ratios.

    python -m benchmarks.data                    images, loader and prepare, a few minutes
    python -m benchmarks.data --only images      one of them
    python -m benchmarks.data --scale 260000     prepare and stream as many small records: time, bytes, peak memory

images   JPEGs of 640 x 480 to squares of 384 pixels, and to five tiles: the loader's code against plain Pillow (open,
         convert, bicubic resize, array)
loader   an epoch of shards whose images are stored at 384 pixels, against tarfile and Pillow's decoding alone; what the
         loader spends on tokenisation is shown apart
prepare  the whole command with 1 and with 2 processes, which needs two idle cores

The first two run on one core in this process, in turn, and count its CPU time. All inputs are made here from a seed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from PIL import Image

from datamodules.captions import CaptionData
from datamodules.collate import caption_row, image_inputs
from datamodules.shards import Sample, decode
from src.io.shards import write_shards
from src.models.tiling import Square, anyres
from src.text.tokenizer import Codec

SIZE, LARGE, SMALL = 384, (640, 480), (64, 48)
WORDS = "a red ring near the blue cross on grey stone under two small green boxes and an old round tower"
INTERVAL = 0.5  # seconds between two looks at the memory of processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="default: all three")
    for name, default in {"runs": 7, "images": 2000, "scale": 0, "workers": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--stream", type=Path, help="read an epoch of this folder; used by the benchmark itself")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stream:
        return stream(options.stream, options.workers)
    with tempfile.TemporaryDirectory() as temporary:
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
        seconds = in_turn({"plain": plain, "ours": lambda layout=layout: ours(layout)}, options.runs)
        show(f"images, {title}", {name: value / len(photos) for name, value in seconds.items()}, "plain", "ours")


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
    seconds = in_turn({"plain": plain, "loader": loader, "tokenisation": tokenise}, options.runs)
    seconds = {name: value / count for name, value in seconds.items()}
    seconds["the rest"] = seconds["loader"] - seconds["tokenisation"]
    show("loader, stored at 384", seconds, "plain", "the rest")


def compare_prepare(folder: Path, options: argparse.Namespace) -> None:
    """Every image under several prompts, so that the work outweighs the start of the processes."""
    images = write_images(folder, options.images, LARGE)
    prompts = [f"Describe it, way {number}." for number in range(6)]
    rows = [{"image": name, "prompt": prompt, "caption": caption(n)} for n, name in images for prompt in prompts]
    (folder / "a.json").write_text(json.dumps(rows))
    seconds: dict[str, list[float]] = defaultdict(list)
    for run in range(3):
        for processes in (1, 2):
            began = time.perf_counter()
            prepare(folder, folder / f"{run}-{processes}", size=SIZE, processes=processes)
            seconds[f"{processes} processes"].append((time.perf_counter() - began) / len(rows))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    show("prepare, 640 x 480 to 384", medians, "1 processes", "2 processes")


PARTS = {"images": compare_images, "loader": compare_loader, "prepare": compare_prepare}


def scale(folder: Path, count: int, workers: int) -> None:
    """Prepare and stream `count` records. Memory: the greatest of each process until half of the time, and in all."""
    images = write_images(folder, count, SMALL, distinct=1000)
    with (folder / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"image": name, "caption": caption(n)}) + "\n" for n, name in images)
    line = "| {:8} | {:>9} | {:>9} | {:>9} | {:>12} | {:>12} | {:>10} |\n"
    columns = ("step", "seconds", "samples/s", "processes", "MB, halfway", "MB, peak", "MB on disk")
    sys.stdout.write(line.format(*columns) + line.format(*["---"] * len(columns)))
    out = folder / "out"
    this = [sys.executable, "-m", "benchmarks.data", "--workers", str(workers), "--stream", str(out)]
    for step, command in (("prepare", prepare_command(folder, out, size=SMALL[0])), ("epoch", this)):
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            memory = Watch(process.pid)
            output, errors = process.communicate()
        halfway, peak = memory.stop()
        if process.returncode:
            sys.exit(f"{step} failed:\n{errors[-2000:]}")
        num, seconds = count, time.perf_counter() - began
        if step == "epoch":  # without the start of the process
            num, seconds = json.loads(output)
        disk = sum(file.stat().st_size for file in out.rglob("*.*"))
        cells = (f"{seconds:.0f}", f"{num / seconds:.0f}", len(peak), text(halfway), text(peak), f"{disk / 1e6:.0f}")
        sys.stdout.write(line.format(step, *cells))


def stream(folder: Path, workers: int) -> None:
    """Read one epoch of training batches; print their samples, and seconds."""
    codec = Codec.load(folder / "tokenizer")
    settings: dict[str, Any] = {"batch_size": 64, "response_length": 64, "image_size": SMALL[1], "workers": workers}
    data = CaptionData(path=str(folder), codec=codec, **settings)
    began = time.perf_counter()
    num = sum(len(batch) for batch in data.train_dataloader())
    sys.stdout.write(json.dumps([num, time.perf_counter() - began]))


class Watch:
    """The resident memory of a process and of all below it, in MB, until `stop` (Linux)."""

    def __init__(self, root: int) -> None:
        self.root, self.looks, self.done = root, list[dict[int, float]](), Event()
        self.thread = Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.done.wait(INTERVAL):
            memory, parents = {}, {}
            for status in Path("/proc").glob("[0-9]*/status"):
                try:
                    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
                    parents[int(fields["Pid"])] = int(fields["PPid"])
                    memory[int(fields["Pid"])] = int(fields["VmRSS"].split()[0]) / 1000
                except (OSError, KeyError):  # it has ended
                    continue
            family = {self.root}
            while more := {pid for pid, parent in parents.items() if parent in family} - family:
                family |= more
            self.looks.append({pid: memory[pid] for pid in family if pid in memory})

    def stop(self) -> tuple[list[float], list[float]]:
        """The memory of each process up to half of the time, and in all of it; the largest first."""
        self.done.set()
        self.thread.join()
        halves = []
        for looks in (self.looks[: len(self.looks) // 2 + 1], self.looks):
            peaks: dict[int, float] = defaultdict(float)
            for look in looks:
                for pid, value in look.items():
                    peaks[pid] = max(peaks[pid], value)
            halves.append(sorted(peaks.values(), reverse=True))
        return halves[0], halves[1]


def text(memory: list[float]) -> str:
    return " ".join(f"{value:.0f}" for value in memory[:4]) + (" ..." if len(memory) > 4 else "")


def prepare_command(folder: Path, out: Path, *, size: int, processes: int | None = None) -> list[str]:
    annotations = next(folder.glob("a.json*"))
    settings = {
        "out": out, "images": folder / "images", "annotations": annotations, "image_size": size, "vocab_size": 400,
        **({"processes": processes} if processes else {}),
    }  # fmt: skip
    command = [sys.executable, "-m", "src.prepare", "conf=photos"]
    return [*command, *(f"prepare.{name}={value}" for name, value in settings.items())]


def prepare(folder: Path, out: Path, *, size: int, processes: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # one core a process
    command = prepare_command(folder, out, size=size, processes=processes)
    subprocess.run(command, check=True, capture_output=True, env=environment)


def in_turn(sides: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of CPU time of each side, run in turn, after one run that warms up."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for run in range(runs + 1):
        for name, side in sides.items():
            began = time.process_time()
            side()
            if run:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(title: str, seconds: dict[str, float], slow: str, fast: str) -> None:
    """seconds: per sample."""
    parts = ", ".join(f"{name} {value * 1e3:.2f} ms = {1 / value:.0f}/s" for name, value in seconds.items())
    sys.stdout.write(f"{title}: {parts}; {fast} is {seconds[slow] / seconds[fast]:.2f} x as fast as {slow}\n")
    sys.stdout.flush()


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


def record(key: str, seed: int) -> dict:
    return {"key": key, "prompt": "Describe the picture.", "captions": [{"text": caption(seed), "swaps": []}]}


def opened(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC)


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
