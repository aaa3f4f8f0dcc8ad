"""A model's tensors wherever they are stored, under our names: model folders and checkpoints of a training run.

stored = in_folder(ModelFolder.open(path))
stored = in_checkpoint("runs/stage2/checkpoints/last.ckpt")      or the sharded folder of several processes
stored.tensors, stored.read(["lm_head.weight"])
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from src.io.errors import UserError
from src.models.hf.folder import ModelFolder

BACKBONE = "backbone."  # the model's name within an objective
DAMAGE = (RuntimeError, EOFError, KeyError, TypeError, AttributeError, pickle.UnpicklingError, CheckpointException)


@dataclass(frozen=True)
class Stored:
    """Tensors on disk."""

    tensors: dict[str, Tensor]  # without memory: shape and dtype of each
    read: Callable[[list[str]], Mapping[str, Tensor]]


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint of a training run: one file, or a sharded folder."""
    return path.is_file() or (path / ".metadata").is_file()


def in_folder(folder: ModelFolder) -> Stored:
    """Tensors of a model folder."""
    specs = {name: folder.weights.specs[theirs] for name, theirs in folder.names.items()}
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    return Stored(tensors, lambda names: {name: folder.read(name) for name in names})


def in_checkpoint(path: Path) -> Stored:
    """Tensors of the model in a Lightning checkpoint. Raises UserError where it is damaged or holds no model."""
    with _explained(path):
        stored = _in_file(path) if path.is_file() else _in_shards(path)
    if not stored.tensors:
        raise UserError(f"{path} holds no model: no tensor in it is called {BACKBONE}...")
    return stored


def _in_file(path: Path) -> Stored:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    found = {name.removeprefix(BACKBONE): tensor for name, tensor in state.items() if name.startswith(BACKBONE)}
    return Stored(
        {name: tensor.to("meta") for name, tensor in found.items()}, lambda names: {name: found[name] for name in names}
    )


def _in_shards(path: Path) -> Stored:
    """What Lightning's ModelParallelStrategy writes: torch's distributed checkpoint of {"state_dict": ..., ...}."""
    prefix = f"state_dict.{BACKBONE}"
    tensors = {
        name.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in FileSystemReader(path).read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }

    def read(names: list[str]) -> dict[str, Tensor]:
        found = {name: torch.empty_like(tensors[name], device="cpu") for name in names}
        named = {"state_dict": {BACKBONE + name: tensor for name, tensor in found.items()}}
        with _explained(path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            load(named, storage_reader=FileSystemReader(path), no_dist=True)
        return found

    return Stored(tensors, read)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What a reader raises about a damaged checkpoint, as a ValueError that names it."""
    try:
        yield
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no whole checkpoint of a run ({type(error).__name__}: {reason})") from error
