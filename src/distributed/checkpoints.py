"""Checkpoints on disk that are whole or known not to be: one file, or the folder of several processes.

RUN/checkpoints/epoch=E-step=S.ckpt           one file: a zip archive, as PyTorch writes them
RUN/checkpoints/epoch=E-step=S.ckpt/          a folder: __RANK_N.distcp and .metadata (torch.distributed.checkpoint),
                                              meta.pt (the loops, callbacks, ...), files.json: sizes and checksums

    write_manifest(folder, ...), replace_folder(folder, path)      the last steps of writing a folder
    is_whole(path)                                                 every byte is as it was written
    read_whole(path)                                               any of them as the content of one file
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
REFUSED = re.compile("inline_container|PytorchStreamWriter|unexpected pos")  # PyTorch drops the words of the system
CHUNK = 1 << 24  # bytes read at a time
Entry = tuple[str, dict[str, int]]


def entries(folder: Path, *, rank: int) -> list[Entry]:
    """(name, {bytes, crc32}) of the files that a rank has written, once they are on disk."""
    own = sorted(folder.glob(f"__{rank}_*")) + ([folder / PLAN, folder / META] if rank == 0 else [])
    found = []
    for file in own:
        sync_path(file)
        found.append((file.name, {"bytes": file.stat().st_size, "crc32": _checksum(file)}))
    return found


def write_manifest(folder: Path, files: Mapping[str, dict[str, int]]) -> None:
    """The list of files that makes a folder a whole checkpoint."""
    write_json(folder / MANIFEST, {"files": dict(sorted(files.items()))})


def replace_folder(temporary: Path, path: Path) -> None:
    """Give a folder its name. One of that name is removed only when the new one is there."""
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
    """Make `name` a link to its neighbour `path`; there is one at every moment, if there was one before."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    if name.is_dir() and not name.is_symlink():
        shutil.rmtree(name)  # of an earlier version, which wrote it twice
    os.replace(temporary, name)
    sync_path(name.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint: first its name, so that nobody takes what is left for one."""
    if path.is_dir() and not path.is_symlink():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.replace(old)
        shutil.rmtree(old, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def recover(folder: Path) -> None:
    """Give checkpoints their names back that a kill has left without, and remove what it left half written."""
    for old in sorted(folder.glob(".*.ckpt.old")):
        path = folder / old.name.removeprefix(".").removesuffix(".old")
        if not path.exists() and is_whole(old):
            old.replace(path)
    for rest in [*folder.glob(".*.ckpt.old"), *folder.glob(".*.ckpt.tmp"), *folder.glob(".*.whole")]:
        if rest.is_dir() and not rest.is_symlink():
            shutil.rmtree(rest)
        else:
            rest.unlink()


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has the checksums that it was stored with."""
    if path.is_dir():
        try:
            files = check_sizes(path)
        except (OSError, ValueError):
            return False
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            sums = pool.map(lambda name: _checksum(path / name), files)
            return all(entry["crc32"] == found for entry, found in zip(files.values(), sums, strict=True))
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError):
        return False


def check_sizes(folder: Path) -> dict[str, dict[str, int]]:
    """The files of a checkpoint folder. Raises UserError where one is not there, or not as long as it was."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        sizes = {name: entry["bytes"] for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no whole checkpoint: its {MANIFEST} cannot be read") from error
    wrong = [name for name, size in sizes.items() if not (folder / name).is_file() or _size(folder / name) != size]
    if wrong:
        raise UserError(f"{folder} is damaged: {wrong[0]} is missing or not as long as it was")
    return files


def read_whole(path: Path) -> dict[str, Any]:
    """The content of a checkpoint as one process would have saved it, on the CPU. Of several ranks all have to ask.

    Of a folder it needs disk space for one more beside it, for as long as the content is used; ranks share that.
    """
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    check_sizes(path)
    joined = path.with_name(f".{path.name}.whole")
    if rank() == 0:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            dcp_to_torch_save(path, joined)
    gather(None)  # it is there
    content = torch.load(joined, map_location="cpu", weights_only=True, mmap=True)
    gather(None)  # all have it open
    if rank() == 0:
        joined.unlink()
    optimizers = [content[name] for name in sorted(content) if name.startswith("optimizer_")]
    meta = torch.load(path / META, map_location="cpu", weights_only=True)
    return {**meta, "state_dict": content["state_dict"], "optimizer_states": [_numbered(state) for state in optimizers]}


def named(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The state of one process's optimizer with the names of its parameters, in its order, instead of numbers."""
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[number]: found for number, found in state["state"].items()}, "param_groups": groups}


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with numbers for its parameters, as one process has it, instead of their names."""
    groups, numbers = [], {}
    for group in state["param_groups"]:
        for name in group["params"]:
            numbers[name] = len(numbers)
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    return {"state": {numbers[name]: found for name, found in state["state"].items()}, "param_groups": groups}


def _size(file: Path) -> int:
    return file.stat().st_size


def _checksum(file: Path) -> int:
    found = 0
    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            found = zlib.crc32(block, found)
    return found
