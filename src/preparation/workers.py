"""The shards of a dataset as jobs, in this process or in several.

    job -> its items -> samples -> dataset/train/train-000003.tar -> reports/train-000003.json

`dataset` is a `src.preparation.builder.Dataset`. A shard depends on its items alone, so its bytes do not depend on the
number of processes. The report is written after the tar and holds its sha256 and a hash of what it was made of: a shard
whose report fits is finished, and is kept when the command is run again.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from io import BytesIO
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from src.io.errors import UserError
from src.io.files import read_json, sha256, write_json
from src.io.shards import write_shard
from src.preparation.counts import Counts, Reject
from src.preparation.items import Items
from src.text.tokenizer import Codec

DATA, ITEMS, REPORTS = "dataset", "items.db", "reports"  # in the folder of an unfinished dataset
WORTH = 1000  # samples that are worth the start of one more process, which takes seconds


class Job(NamedTuple):
    """One shard: the items of a split with numbers from `start` to `stop` (exclusive)."""

    split: str
    number: int
    start: int
    stop: int

    def tar(self, folder: Path) -> Path:
        return folder / DATA / self.split / f"{self.split}-{self.number:06d}.tar"

    def report(self, folder: Path) -> Path:
        return folder / REPORTS / f"{self.split}-{self.number:06d}.json"


def is_finished(job: Job, dataset: Any, codec: Codec, items: Items, folder: Path) -> bool:
    """Whether the shard is as its report says, and what it was made of is what it was."""
    try:
        report = read_json(job.report(folder))
        entry, own = report["entry"], items.between(job.split, job.start, job.stop)
        is_whole = entry is None or sha256(job.tar(folder)) == entry["sha256"]
        return is_whole and report["made_of"] == _made_of(dataset, codec, own)
    except (FileNotFoundError, UserError, KeyError):  # there is none, or it is damaged
        return False


def _made_of(dataset: Any, codec: Codec, items: Sequence[Any]) -> str:
    """A hash of the tokenizer, the items, and the size and time of their files."""
    digest = hashlib.blake2b(codec.fingerprint.encode(), digest_size=16)
    for item in items:
        file = dataset.file_of(item)
        status = file.stat() if file is not None and file.is_file() else None
        digest.update(repr(item).encode("utf-8", "surrogatepass"))
        digest.update(f"{status and (status.st_size, status.st_mtime_ns)};".encode())
    return digest.hexdigest()


def write(job: Job, dataset: Any, codec: Codec, items: Items, folder: Path, advance: Callable[[], Any]) -> None:
    """Write the tar and the report of a job. advance: called after every item"""
    own = items.between(job.split, job.start, job.stop)
    made_of = _made_of(dataset, codec, own)  # before the files are read
    rejects, lengths = list[Reject](), Counter[int]()
    counts = Counts(rejects.append)
    origins = [source["name"] for source in dataset.mixture]
    columns: dict[str, list] = {"prompt_tokens": [], "sizes": [], "source": []}  # of the index, one entry a sample

    @cache
    def prompt_tokens(prompt: str, images: int) -> int:
        return sum(token != codec.image_id for token in codec.prompt_ids(prompt, images=images))

    def samples() -> Iterator[dict]:
        for item in own:
            counts.source = item.origin
            for sample in dataset.samples([item], codec, counts):
                record, image = sample["json"], sample.get("png") or sample.get("jpg")
                columns["prompt_tokens"].append(prompt_tokens(record.get("prompt", ""), int(image is not None)))
                if image is not None:
                    with Image.open(BytesIO(image)) as header:
                        columns["sizes"].append(header.size)
                if len(origins) > 1:
                    columns["source"].append(origins.index(item.origin))
                for caption in record["captions"]:
                    lengths[len(caption["ids"] if "ids" in caption else codec.encode(caption["text"])[0])] += 1
                yield sample
            advance()

    entry = write_shard(job.tar(folder), samples())
    if entry["count"]:
        entry |= {name: values for name, values in columns.items() if values}
    else:
        job.tar(folder).unlink()
    report = {"entry": entry if entry["count"] else None, "rejects": rejects, "lengths": sorted(lengths.items())}
    write_json(job.report(folder), {"made_of": made_of, **report, **counts.report()})


def num_processes(requested: int | None, jobs: Sequence[Job]) -> int:
    """At most one process a job; None: all cores, but fewer for small datasets."""
    if requested is not None:
        return max(1, min(requested, len(jobs)))
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(num_cores, len(jobs), sum(job.stop - job.start for job in jobs) // WORTH))


def write_in_processes(
    jobs: Sequence[Job], dataset: Any, folder: Path, *, processes: int, advance: Callable[[int], Any]
) -> None:
    """Write the jobs in worker processes. advance: called with the number of items of a finished shard

    Raises UserError if a worker is killed, and what `dataset.samples` raises; workers then finish their shards. If this
    process is killed, they end at once.
    """
    # A fork server: this process may have threads (of torch, of tokenizers), whose locks a forked child would inherit.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of workers: each has a core
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(dataset, folder))
    try:
        futures = {executor.submit(_work, job): job for job in jobs}
        for future in as_completed(futures):
            future.result()
            advance(futures[future].stop - futures[future].start)
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process was killed, often because memory ran out; the same command continues, and "
            f"prepare.processes=N with fewer than {processes} needs less memory"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


_state: dict[str, Any] = {}  # of a worker process


def _start(dataset: Any, folder: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the main process ends its workers
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    codec = Codec.load(folder / DATA / "tokenizer")
    _state.update(dataset=dataset, codec=codec, items=Items(folder / ITEMS, read_only=True), folder=folder)


def _exit_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        os._exit(1)


def _work(job: Job) -> None:
    write(job, **_state, advance=lambda: None)
