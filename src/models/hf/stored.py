"""A model's stored tensors, under our names: from a model folder or from a checkpoint of a training run.

stored = in_folder(ModelFolder.open(path))
stored = in_checkpoint("runs/stage2/checkpoints/last.ckpt")      a file, or a sharded checkpoint's folder
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

BACKBONE = "backbone."  # prefix of the model's tensor names in an objective's state_dict
DAMAGE = (RuntimeError, EOFError, KeyError, TypeError, AttributeError, pickle.UnpicklingError, CheckpointException)


@dataclass(frozen=True)
class Stored:
    """Tensors on disk."""

    tensors: dict[str, Tensor]  # on the meta device: only shape and dtype
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
    """Tensors of the model in a Lightning checkpoint. Raises UserError if it is damaged or contains no model."""
    with _explained(path):
        stored = _in_file(path) if path.is_file() else _in_shards(path)
    if not stored.tensors:
        raise UserError(f"{path} contains no model: it has no tensor named {BACKBONE}*")
    return stored


def _in_file(path: Path) -> Stored:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    tensors = {name.removeprefix(BACKBONE): tensor for name, tensor in state.items() if name.startswith(BACKBONE)}
    return Stored(
        {name: tensor.to("meta") for name, tensor in tensors.items()},
        lambda names: {name: tensors[name] for name in names},
    )


def _in_shards(path: Path) -> Stored:
    """Tensors of the distributed checkpoint {"state_dict": ..., ...} that Lightning's ModelParallelStrategy writes."""
    prefix = f"state_dict.{BACKBONE}"
    tensors = {
        name.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in FileSystemReader(path).read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }

    def read(names: list[str]) -> dict[str, Tensor]:
        loaded = {name: torch.empty_like(tensors[name], device="cpu") for name in names}
        state = {"state_dict": {BACKBONE + name: tensor for name, tensor in loaded.items()}}
        with _explained(path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            load(state, storage_reader=FileSystemReader(path), no_dist=True)
        return loaded

    return Stored(tensors, read)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors about a damaged checkpoint into a UserError that names it."""
    try:
        yield
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a complete checkpoint of a run ({type(error).__name__}: {reason})") from error
