"""Read and write shards. Every file is written atomically, so a killed process leaves no partial one.

    write_shards(folder, samples, prefix="train", per_shard=512, kind="captions", tokenizer=...)
        samples -> train-000000.tar, train-000001.tar, ... -> index.json, written last
    read_manifest(folder), read_shard(path)     index.json, and the samples of a tar as they were written
    Tar(file).read(17)                          one sample of a tar, however damaged the rest of it is

A sample is `{"__key__": "KEY", "json": {...}, "png": b"..."}`: a file `KEY.<name>` for every name that does not start
with an underscore; a dict becomes UTF-8 JSON. Tar headers contain neither time nor user, so equal samples give equal
bytes. A folder without index.json is unfinished: `write_shards` removes its shards and starts over.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.handlers import ignore_and_continue, reraise_exception
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from src.io.errors import UserError
from src.io.files import FORMAT, atomic, read_json, sha256, write_bytes
from src.io.remote import Remote

REMAKE = {  # kind of a folder -> the command that makes it
    "drafts": "python -m src.draft conf=draft out=...",
    "round": "python -m src.revise conf=revise out=...",
}
INDEX = "index.json"
DATASET = "dataset"  # kind of a folder that contains splits instead of shards
META = re.compile(r"__[^/]*__($|/)")  # names of webdataset's own files
MAX_KEY = 90  # bytes; a name in a tar header has up to 100


def write_shards(
    folder: str | Path,
    samples: Iterable[Mapping[str, Any]],
    *,
    prefix: str,
    per_shard: int,
    kind: str,
    tokenizer: str | None,
    counts: Mapping[str, int] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict:
    """Write a data folder and return its index. Raises UserError if the folder is finished already.

    counts, extra: counts (of skipped samples by reason, ...) and further keys of the index. They are read after the
        last sample, so the iterable may fill them as it goes. `counts["written"]` is added.
    """
    folder = Path(folder)
    if per_shard < 1:
        raise UserError(f"per_shard must be at least 1, got {per_shard}")
    if (folder / INDEX).exists():
        raise UserError(f"{folder} is already finished; remove it or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob(f"{prefix}-*.tar"), *folder.glob(f".{prefix}-*.tmp")]:
        stale.unlink()
    shards, remaining = list[dict](), iter(samples)
    for first in remaining:
        group = chain([first], islice(remaining, per_shard - 1))
        shards.append(write_shard(folder / f"{prefix}-{len(shards):06d}.tar", group))
    return write_index(folder, shards, kind=kind, tokenizer=tokenizer, counts=counts, extra=extra)


def write_shard(path: Path, samples: Iterable[Mapping[str, Any]]) -> dict:
    """Write one tar atomically and return its index entry."""
    count = 0
    with atomic(path) as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
        for sample in samples:
            key = sample["__key__"]
            if not 0 < len(key.encode()) <= MAX_KEY or "." in key or "/" in key:
                raise ValueError(f"a key must have 1 to {MAX_KEY} bytes, no dot and no slash, got {key!r}")
            files = {name: value for name, value in sample.items() if not name.startswith("_")}
            for name, value in files.items():
                if isinstance(value, dict):
                    files[name] = json.dumps(value, ensure_ascii=False).encode()
            tar.write({"__key__": key, **files})
            count += 1
    return shard_entry(path, count)


def shard_entry(path: Path, count: int) -> dict:
    """The index entry of a shard: name, count, bytes, sha256."""
    return {"name": path.name, "count": count, "bytes": path.stat().st_size, "sha256": sha256(path)}


def write_index(
    folder: Path,
    shards: list[dict],
    *,
    kind: str,
    tokenizer: str | None,
    counts: Mapping[str, int] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict:
    """Write index.json, which marks a folder of shards as finished, and return it."""
    total = {**(counts or {}), "written": sum(shard["count"] for shard in shards)}
    index = {"format": FORMAT, "kind": kind, "tokenizer": tokenizer, "shards": shards, "counts": total}
    index |= extra or {}
    lines = ",\n".join(
        f"  {json.dumps(shard, ensure_ascii=False)}" for shard in shards
    )  # one a shard, as they are long
    head = json.dumps({**index, "shards": []}, indent=1, ensure_ascii=False)
    write_bytes(folder / INDEX, head.replace('"shards": []', f'"shards": [\n{lines}\n ]', 1).encode() + b"\n")
    return index


def image_name(data: bytes) -> str:
    """File name extension of an encoded image, `png` or `jpg`. Raises ValueError for other formats."""
    if data.startswith(b"\x89PNG"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    raise ValueError(f"an image must be PNG or JPEG, got bytes that start with {data[:4]!r}")


class Tar:
    """Random access to the samples of a tar file: the headers are read once, by seeking, the data when asked for.

    samples: of each sample `__key__`, and (offset, size) of each file in it

    Files behind a cut are gone. A damaged header loses its own file only: the next good one is looked for behind it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        if hasattr(os, "posix_fadvise"):  # the kernel reads ahead into its own memory, in the order of the file
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        self.samples = list(group_by_keys(self._files(), handler=ignore_and_continue))

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> dict[str, Any]:
        """The sample at `index`: `__key__`, and the bytes of each file. A file that is cut off by now is left out."""
        places = self.samples[index]
        raw = {"__key__": places["__key__"]}
        for name, place in places.items():
            if not name.startswith("__"):
                offset, size = place
                data = os.pread(self._file.fileno(), size, offset)  # needs no position, which forks would share
                if len(data) == size:
                    raw[name] = data
        return raw

    def __del__(self) -> None:
        self._file.close()

    def _files(self) -> Iterator[dict[str, Any]]:
        """Name and place of every whole file, as webdataset groups them."""
        end = os.fstat(self._file.fileno()).st_size
        try:
            tar = tarfile.open(fileobj=self._file, mode="r:", ignore_zeros=True)  # noqa: SIM115
        except tarfile.TarError:  # empty, or no header in the whole file
            return
        while tar.offset <= end:
            try:
                member = tar.next()
            except tarfile.TarError:  # the header behind a damaged extended header, or the end of the file
                tar.offset += tarfile.BLOCKSIZE
                continue
            if member is None:
                return
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            if member.isreg() and not META.match(member.name) and member.offset_data + member.size <= end:
                yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": ""}


def read_tar(path: Path | Remote) -> Iterator[dict[str, Any]]:
    """The readable samples of one tar, in order: `__key__`, and the bytes of each file."""
    with path.open("rb") as file:
        tar = Tar(file)
        yield from (tar.read(index) for index in range(len(tar)))


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of one tar as they were written: `__key__`, `json` as a dict, everything else as bytes.

    Raises what webdataset raises if the tar is damaged.
    """
    with path.open("rb") as stream:
        files = tar_file_expander([{"url": str(path), "stream": stream}], handler=reraise_exception)
        for raw in group_by_keys(files, handler=reraise_exception):
            yield {**raw, "json": json.loads(raw["json"])}


def read_manifest(folder: str | Path) -> dict:
    """The index.json of a finished data folder. Raises UserError if it is missing, damaged or of another format."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise UserError(f"{folder} is not a finished data folder: it has no {INDEX}")
    return check_manifest(read_json(path), path)


def check_manifest(content: dict, path: Path | Remote) -> dict:
    """The content of an index.json. Raises UserError if it is damaged or of another format. path: for errors"""
    kind, form = content.get("kind"), content.get("format", FORMAT)
    if kind == DATASET:
        folder = str(path).removesuffix(f"/{INDEX}")
        raise UserError(f"{folder} is a whole dataset; choose a split, such as {folder}/test")
    if form != FORMAT:
        command = REMAKE.get(str(kind), "python -m src.prepare conf=... prepare.out=...")
        raise UserError(
            f"{path} has format {form!r}, this version reads format {FORMAT}: remove the folder and make it again with "
            f"`{command}`"
        )
    if not {"kind", "tokenizer", "shards"} <= content.keys():
        raise UserError(f"{path} is damaged (it lacks the kind, the tokenizer, or shards)")
    return content
