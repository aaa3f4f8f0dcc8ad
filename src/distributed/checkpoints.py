"""Checkpoints on disk, with checksums: a single file, or a folder of several ranks.

RUN/checkpoints/epoch=E-step=S.ckpt           a file: the zip archive of `torch.save`
RUN/checkpoints/epoch=E-step=S.ckpt/          a folder: __RANK_N.distcp and .metadata (torch.distributed.checkpoint),
                                              meta.pt (loops, callbacks, ...), files.json (sizes and checksums)

The average of the weights (`callbacks/ema.py`) is the file's entry `ema`, by name of the parameter. A folder has it
among the tensors of `state_dict`, with `ema.` before each name, so that every rank writes and reads its own shards.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load

from src.distributed.parallel import gather, rank
from src.io.files import publish, sync_path, write_json

MANIFEST, META, PLAN = "files.json", "meta.pt", ".metadata"
EMA = "ema."  # before the names of averages
CHUNK = 1 << 24  # bytes read at a time


def written_files(folder: Path, *, rank: int) -> dict[str, dict[str, int]]:
    """Sync the files that a rank has written; returns {name: {bytes, crc32}}."""
    files = sorted(folder.glob(f"__{rank}_*")) + ([folder / PLAN, folder / META] if rank == 0 else [])
    for file in files:
        sync_path(file)
    return {file.name: _size_and_checksum(file) for file in files}


def publish_folder(temporary: Path, path: Path, files: dict[str, dict[str, int]]) -> None:
    """Give a written folder its name, and the list of files that makes it a checkpoint.

    Raises FileNotFoundError if ranks wrote to different file systems.
    """
    for name in files:
        (temporary / name).stat()
    write_json(temporary / MANIFEST, {"files": dict(sorted(files.items()))})
    remove(path)
    publish(temporary, path)


def remove(path: Path) -> None:
    """Remove a checkpoint. What a kill leaves of a folder is not intact."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_intact(path: Path) -> bool:
    """Whether the checksums of a checkpoint match its content."""
    try:
        if path.is_dir():
            files = json.loads((path / MANIFEST).read_bytes())["files"]
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                sizes_and_checksums = list(pool.map(_size_and_checksum, [path / name for name in files]))
            return sizes_and_checksums == list(files.values())
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):
        return False  # NOTE: a damaged zip file may raise any of the last three


def read_full(path: Path) -> dict[str, Any]:
    """The content of a checkpoint on the CPU, as a single process would have saved it. All ranks must call this.

    NOTE: a folder is first joined into a memory-mapped file beside it, which occupies the disk while the content is
    in use; the ranks share it.
    """
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    joined = path.with_name(f".{path.name}.tmp")
    if rank() == 0:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            dcp_to_torch_save(path, joined)
    gather(None)  # barrier: the file is written
    content = torch.load(joined, map_location="cpu", weights_only=True, mmap=True)
    gather(None)  # barrier: all ranks have it open
    if rank() == 0:
        joined.unlink()
    optimizers = []  # with parameter numbers instead of names, as a single process has them
    for state in (content[name] for name in sorted(content) if name.startswith("optimizer_")):
        names = [name for group in state["param_groups"] for name in group["params"]]
        numbers = {name: number for number, name in enumerate(names)}
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
        states = {numbers[name]: values for name, values in state["state"].items()}
        optimizers.append({"state": states, "param_groups": groups})
    meta = torch.load(path / META, map_location="cpu", weights_only=True)
    state = content["state_dict"]
    average = {name.removeprefix(EMA): state.pop(name) for name in list(state) if name.startswith(EMA)}
    content = {**meta, "state_dict": state, "optimizer_states": optimizers}
    return {**content, "ema": average} if average else content


def read_average(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """This rank's shards of the average in a folder, by name of the parameter of the sharded `module`; may be empty."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    shards = {
        name: torch.empty_like(parameter.detach(), dtype=torch.float32)
        for name, parameter in module.named_parameters()
        if f"state_dict.{EMA}{name}" in stored
    }
    if shards:
        load({"state_dict": {EMA + name: shard for name, shard in shards.items()}}, checkpoint_id=path)
    return shards


def keep_trained(module: nn.Module) -> None:
    """Leave parameters without gradients out of `module.state_dict()`, and do not miss them when one is loaded."""

    def frozen() -> set[str]:
        return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}

    def drop(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in frozen():
            state.pop(prefix + name, None)

    def allow(_: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = sorted(set(keys.missing_keys) - frozen())

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_post_hook(allow)


def _size_and_checksum(file: Path) -> dict[str, int]:
    crc32 = 0
    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            crc32 = zlib.crc32(block, crc32)
    return {"bytes": file.stat().st_size, "crc32": crc32}
