"""The parts of `benchmarks.data` that concern many records: memory, kills, and a table for 100 million pairs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from threading import Event, Thread
from typing import Any

import numpy as np

from benchmarks.inputs import prepare_command, write_images, write_rows
from datamodules.captions import CaptionData
from datamodules.stream import Index, Shard, Stream, read_index
from src.io.shards import INDEX, write_index
from src.text.tokenizer import Codec

SMALL, PROMPTS = (64, 48), ("Describe the picture.",)
INTERVAL = 0.5  # seconds between two looks at the memory of processes


def scale(folder: Path, count: int, workers: int) -> None:
    """Prepare and stream `count` records. Memory: the greatest of each process until half of the time, and in all."""
    annotations = write_rows(folder / "a.jsonl", write_images(folder, count, SMALL, distinct=1000), PROMPTS)
    line = "| {:8} | {:>9} | {:>9} | {:>9} | {:>12} | {:>12} | {:>10} |\n"
    columns = ("step", "seconds", "samples/s", "processes", "MB, halfway", "MB, peak", "MB on disk")
    sys.stdout.write(line.format(*columns) + line.format(*["---"] * len(columns)))
    out = folder / "out"
    this = [sys.executable, "-m", "benchmarks.data", "--workers", str(workers), "--stream", str(out)]
    for step, command in (("prepare", prepare_command(annotations, out, size=SMALL[0])), ("epoch", this)):
        began = time.perf_counter()
        output, (halfway, peak) = watched(command)
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


def kills(folder: Path, count: int, number: int, *, seed: int = 0) -> None:
    """Prepare `count` records; then again, all processes killed at `number` random moments, each time continued."""
    annotations = write_rows(folder / "a.jsonl", write_images(folder, count, SMALL, distinct=1000), PROMPTS)
    watched(prepare_command(annotations, folder / "whole", size=SMALL[0]))
    expected, rng = shards(folder / "whole"), Random(seed)
    out, partial = folder / "out", folder / "out.partial"
    command = prepare_command(annotations, out, size=SMALL[0])
    moments = [rng.uniform(n, n + 1) * 0.9 * len(expected) / number for n in range(number)]  # in finished shards
    finished, lost, again, peak = dict[str, tuple](), 0, 0, 0.0

    def is_due(moment: float) -> bool:
        """Whether so many shards are finished, one of them in this run; below one: whether records are being read."""
        least = max(int(moment), len(finished) + 1 if finished else 0)
        return (partial / "items.db").exists() and len(list(partial.glob("reports/*.json"))) >= least

    for moment in [*moments, None]:
        due = None if moment is None else lambda moment=moment: is_due(moment)
        _, (_, peaks) = watched(command, kill=due, delay=rng.uniform(0, 0.3))
        peak = max([peak, *peaks])
        place = out if moment is None else partial
        tars = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in place.rglob("*.tar")}
        again += sum(tars.get(name) != written for name, written in finished.items())
        if moment is not None:
            reports = {path.stem for path in partial.glob("reports/*.json")}
            finished = {name: written for name, written in tars.items() if name.removesuffix(".tar") in reports}
            begun = len({path.name.strip(".").partition(".")[0] for path in partial.rglob("*-*.tar*")} - reports)
            lost += begun
            sys.stdout.write(f"killed with {len(finished)} of {len(expected)} shards finished, {begun} begun\n")
    verdict = "equal" if shards(out) == expected else "NOT EQUAL"
    sys.stdout.write(
        f"{len(expected)} shards by sha256, as without kills: {verdict}; begun shards lost: {lost}; finished shards "
        f"written again: {again}; peak memory of a process: {peak:.0f} MB\n"
    )


def shards(out: Path) -> dict[str, str]:
    """The sha256 of each shard, as the manifest says."""
    splits = json.loads((out / "manifest.json").read_text())["splits"]
    return {shard["name"]: shard["sha256"] for split in splits.values() for shard in split["shards"]}


def watched(command: list[str], *, kill: Callable[[], bool] | None = None, delay: float = 0.0) -> tuple[str, Any]:
    """(output, peaks of memory as `Watch` says) of a command. kill: when all its processes are killed, after `delay`
    more seconds"""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        memory = Watch(process.pid)
        while kill and process.poll() is None and not kill():
            time.sleep(0.01)
        if kill:
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
    if process.returncode != (-signal.SIGKILL if kill else 0):
        sys.exit(f"{' '.join(command[1:4])} ended with {process.returncode} before its time:\n{errors[-2000:]}")
    return output, memory.stop()


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


def large(samples: int = 100_000_000, *, nodes: int = 64, gpus: int = 8, per_shard: int = 512, kb: int = 50) -> None:
    """What an index of so many samples takes, from one of fewer; kb: of a sample on disk."""
    ranks, count, rng = nodes * gpus, -(-samples // per_shard), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder, num = Path(temporary), 400
        entries = [
            {
                "name": f"train-{number:06d}.tar", "count": per_shard, "bytes": kb * 1000 * per_shard,
                "sha256": f"{rng.bytes(32).hex()}",
                "prompt_tokens": rng.integers(20, 200, per_shard).tolist(),
                "sizes": rng.integers(240, 641, (per_shard, 2)).tolist(),
                "source": rng.integers(0, 3, per_shard).tolist(),
            }
            for number in range(num)
        ]  # fmt: skip
        sources = [{"name": name, "weight": 1.0} for name in "abc"]
        write_index(folder, entries, kind="captions", tokenizer=None, extra={"sources": sources})
        for entry in entries:
            (folder / entry["name"]).touch()
        one = (folder / INDEX).stat().st_size / (num * per_shard)
        began = time.process_time()
        read_index(folder)
        seconds = (time.process_time() - began) / num
        tracemalloc.start()
        index = read_index(folder)
        held, peak = (value / num for value in tracemalloc.get_traced_memory())
        tracemalloc.stop()
    tiled = tuple(Shard(Path(f"s{n}"), per_shard, source=index.shards[n % num].source) for n in range(count))
    stream = Stream([Index(Path("d"), "captions", None, tiled, "", index.content)], seed=0, weights={})
    began = time.process_time()
    list(stream.places(0, 1))
    order = time.process_time() - began
    starts = [rank * (stream.count // ranks) for rank in range(ranks)]
    batches = [{place.shard.path for place in stream.places(start, start + 16)} for start in starts]
    rows = {
        "shards": f"{count:,} of {kb * per_shard / 1e3:.0f} MB, {kb * samples / 1e9:.1f} TB; {count / ranks:.0f} for "
        f"each of {ranks} ranks",
        "index.json": f"{one:.1f} bytes a sample, {one * samples / 1e9:.1f} GB; parsed in {seconds * count:.0f} s with "
        f"{peak * count / 1e9:.0f} GB",
        "index in memory": f"{held / per_shard:.1f} bytes a sample, {held * count / 1e9:.1f} GB",
        "order of a pass": f"{order:.1f} s",
        "shards in a batch of 16": f"{np.mean([len(names) for names in batches]):.2f} of a rank, "
        f"{len(set().union(*batches))} of all ranks",
    }
    sys.stdout.write("".join(f"{name}: {value}\n" for name, value in rows.items()))
