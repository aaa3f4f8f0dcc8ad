"""Checkpoints on disk, with checksums: a single file, or a folder of several ranks.

RUN/checkpoints/epoch=E-step=S.ckpt           a file: the zip archive of `torch.save`
RUN/checkpoints/epoch=E-step=S.ckpt/          a folder: __RANK_N.distcp and .metadata (torch.distributed.checkpoint),
                                              meta.pt (loops, callbacks, ...), files.json (sizes and checksums)

    write_manifest(folder, ...), replace_folder(folder, path)      the last steps of writing a folder
    is_intact(path)                                                 whether all checksums match
    read_full(path)                                               content of a file or a folder, as from one process
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from src.distributed.parallel import gather, rank
from src.io.errors import UserError
from src.io.files import publish, sync_path, write_json

MANIFEST, META, PLAN = "files.json", "meta.pt", ".metadata"
REFUSED = re.compile("inline_container|PytorchStreamWriter|unexpected pos")  # PyTorch's errors when a disk is full
CHUNK = 1 << 24  # bytes read at a time
Entry = tuple[str, dict[str, int]]


def entries(folder: Path, *, rank: int) -> list[Entry]:
    """Sync the files that a rank has written; returns (name, {bytes, crc32}) of each."""
    files = sorted(folder.glob(f"__{rank}_*")) + ([folder / PLAN, folder / META] if rank == 0 else [])
    written = []
    for file in files:
        sync_path(file)
        written.append((file.name, {"bytes": file.stat().st_size, "crc32": _checksum(file)}))
    return written


def write_manifest(folder: Path, files: Mapping[str, dict[str, int]]) -> None:
    """Write the list of files that marks a folder as a complete checkpoint."""
    write_json(folder / MANIFEST, {"files": dict(sorted(files.items()))})


def replace_folder(temporary: Path, path: Path) -> None:
    """Rename a folder to `path`. A previous checkpoint there is removed only afterwards."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.replace(old)
    publish(temporary, path)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def link(path: Path, name: Path) -> None:
    """Make `name` a link to `path` in the same folder, replacing an older link atomically."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    if name.is_dir() and not name.is_symlink():
        shutil.rmtree(name)  # an earlier version wrote a copy here
    os.replace(temporary, name)
    sync_path(name.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint. A folder is renamed first, so that a partly removed one is not taken for a checkpoint."""
    if path.is_dir() and not path.is_symlink():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.replace(old)
        shutil.rmtree(old, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def recover(folder: Path) -> None:
    """Restore the names of checkpoints that a kill left renamed, and remove partly written ones."""
    for old in sorted(folder.glob(".*.ckpt.old")):
        path = folder / old.name.removeprefix(".").removesuffix(".old")
        if not path.exists() and is_intact(old):
            old.replace(path)
    for leftover in [*folder.glob(".*.ckpt.old"), *folder.glob(".*.ckpt.tmp"), *folder.glob(".*.whole")]:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def is_intact(path: Path) -> bool:
    """Whether the checksums of a checkpoint match its content."""
    if path.is_dir():
        try:
            files = check_sizes(path)
        except (OSError, ValueError):
            return False
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            checksums = pool.map(lambda name: _checksum(path / name), files)
            return all(entry["crc32"] == crc32 for entry, crc32 in zip(files.values(), checksums, strict=True))
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError):
        return False


def check_sizes(folder: Path) -> dict[str, dict[str, int]]:
    """The manifest of a checkpoint folder. Raises UserError if a file is missing or has another size."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        sizes = {name: entry["bytes"] for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no complete checkpoint: cannot read its {MANIFEST}") from error
    damaged = [name for name, size in sizes.items() if not (folder / name).is_file() or _size(folder / name) != size]
    if damaged:
        raise UserError(f"{folder} is damaged: {damaged[0]} is missing or has another size")
    return files


def read_full(path: Path) -> dict[str, Any]:
    """The content of a checkpoint on the CPU, as a single process would have saved it. All ranks must call this.

    NOTE: a folder is first joined into a memory-mapped file beside it, which occupies the disk while the content is
    in use; the ranks share it.
    """
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    check_sizes(path)
    joined = path.with_name(f".{path.name}.whole")
    if rank() == 0:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            dcp_to_torch_save(path, joined)
    gather(None)  # barrier: the file is written
    content = torch.load(joined, map_location="cpu", weights_only=True, mmap=True)
    gather(None)  # barrier: all ranks have it open
    if rank() == 0:
        joined.unlink()
    optimizers = [_by_number(content[name]) for name in sorted(content) if name.startswith("optimizer_")]
    meta = torch.load(path / META, map_location="cpu", weights_only=True)
    return {**meta, "state_dict": content["state_dict"], "optimizer_states": optimizers}


def named(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer state keyed by parameter name instead of number. names: in the optimizer's order."""
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[number]: values for number, values in state["state"].items()}, "param_groups": groups}


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer state keyed by parameter number instead of name, as a single process has it."""
    groups, numbers = [], {}
    for group in state["param_groups"]:
        for name in group["params"]:
            numbers[name] = len(numbers)
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    return {"state": {numbers[name]: values for name, values in state["state"].items()}, "param_groups": groups}


def _size(file: Path) -> int:
    return file.stat().st_size


def _checksum(file: Path) -> int:
    crc32 = 0
    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            crc32 = zlib.crc32(block, crc32)
    return crc32
