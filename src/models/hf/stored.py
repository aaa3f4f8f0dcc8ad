"""A model's tensors in a checkpoint of a training run, under our names.

state = model_state("runs/stage2/checkpoints/last.ckpt")      a file, or a sharded checkpoint's folder
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from src.io.errors import UserError

BACKBONE = "backbone."  # prefix of the model's tensor names in an objective's state_dict
FAULTS = (RuntimeError, EOFError, OSError, KeyError, TypeError, pickle.UnpicklingError, CheckpointException)


def is_checkpoint(path: Path) -> bool:
    return path.is_file() or (path / ".metadata").is_file()


def model_state(path: Path) -> dict[str, Tensor]:
    """Tensors of the model, memory-mapped if the checkpoint is one file. Raises UserError if it is damaged."""
    try:
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        else:
            state = _read_shards(path)
    except FAULTS as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a complete checkpoint of a run ({type(error).__name__}: {reason})") from error
    tensors = {name.removeprefix(BACKBONE): tensor for name, tensor in state.items() if name.startswith(BACKBONE)}
    if not tensors:
        raise UserError(f"{path} contains no model: it has no tensor named {BACKBONE}*")
    return tensors


def _read_shards(path: Path) -> dict[str, Tensor]:
    """`state_dict` of the distributed checkpoint that Lightning's ModelParallelStrategy writes, without optimizers."""
    prefix, reader = "state_dict.", FileSystemReader(path)
    state = {
        name.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix + BACKBONE) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        load({"state_dict": state}, storage_reader=reader, no_dist=True)
    return state
