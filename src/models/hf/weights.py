"""Tensors of a model folder (model.safetensors, or the shards that its index lists), and of a checkpoint of a run.

stored_tensors(folder)                                {name: (file, tensor on the meta device)}; only headers are read
read_tensor(file, "lm_head.weight")                   one tensor, memory-mapped
write_weights(folder, state, max_shard_bytes=5e9)     one shard at a time in memory
model_state("runs/stage2/checkpoints/last.ckpt")      our names -> tensors; a file, or a sharded checkpoint's folder
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from src.distributed.checkpoints import EMA
from src.distributed.parallel import full_tensor
from src.io.errors import UserError

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
FAULTS = (
    *(OSError, EOFError, RuntimeError, KeyError, TypeError, json.JSONDecodeError, pickle.UnpicklingError),
    *(SafetensorError, CheckpointException),
)
BACKBONE = "backbone."  # prefix of the model's tensor names in an objective's state_dict


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn a library's error about a file into a UserError that names it."""
    try:
        yield
    except FAULTS as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is missing, damaged or incomplete ({type(error).__name__}: {reason})") from error


def is_model_folder(folder: str | Path) -> bool:
    """Also that of an adapter (`src/models/lora.py`)."""
    return any((Path(folder) / name).is_file() for name in (SINGLE, INDEX, ADAPTER))


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / ADAPTER).is_file()


def weight_files(folder: Path) -> list[Path]:
    for name in (SINGLE, ADAPTER):
        if (folder / name).is_file():
            return [folder / name]
    with reading(folder / INDEX):
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]


def stored_tensors(folder: Path) -> dict[str, tuple[Path, Tensor]]:
    """(file, tensor on the meta device) by name. Raises UserError for quantized weights, which need scales."""
    stored = {}
    for file in weight_files(folder):
        with reading(file), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                stored[name] = file, opened.get_tensor(name).to("meta")  # mapped, so that no value is read
    for name, (file, tensor) in stored.items():
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{file}: {name} has dtype {tensor.dtype}; supported are {', '.join(DTYPES)}")
    return stored


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor on the CPU, a memory-mapped view of the file: only what you copy is read from disk."""
    # opened for every tensor, so that pages already read do not stay in memory
    with reading(file), safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def plan_shards(
    state: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, max_shard_bytes: float
) -> StateDictSplit:
    """Which tensor goes to which file. A tensor larger than `max_shard_bytes` gets a file of its own."""
    sizes = {name: torch.empty(t.shape, dtype=dtype or t.dtype, device="meta") for name, t in state.items()}
    return split_torch_state_dict_into_shards(sizes, max_shard_size=int(max_shard_bytes))


def write_weights(
    folder: Path, state: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, max_shard_bytes: float = 5e9
) -> None:
    """Write tensors, cast to `dtype` if given, as one file or as shards and an index.

    If tensors are sharded, the other ranks must gather them meanwhile, in the order of `plan_shards`.
    """
    plan = plan_shards(state, dtype=dtype, max_shard_bytes=max_shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: full_tensor(state[name]).detach().to("cpu", dtype).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors makes it readable by its owner only
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def check_finite(name: str, tensor: Tensor, place: str | Path) -> None:
    """Raise UserError if a tensor has NaN or infinite values. One pass, without a copy."""
    if not tensor.is_meta and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{name} of the model in {place} has NaN or infinite values as {dtype}")


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def is_checkpoint(path: Path) -> bool:
    return path.is_file() or (path / ".metadata").is_file()


def model_state(path: Path, *, weights: str | None = None) -> dict[str, Tensor]:
    """Tensors of the model in a checkpoint of a run, memory-mapped if it is one file.

    weights: `raw`, or `ema`: their average, in the dtype of the raw ones. Raises UserError if there is no average, and
        for None if there is one
    """
    with reading(path):
        if path.is_file():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            state, average = content["state_dict"], content.get("ema", {})
        else:
            state = _read_sharded(path)
            average = {name.removeprefix(EMA): state.pop(name) for name in list(state) if name.startswith(EMA)}
    if weights is None and average:
        raise UserError(f"{path} holds the raw weights and their average: set weights=raw or weights=ema")
    if weights == "ema":
        if not average:
            raise UserError(f"{path} holds no average of the weights: it is of a run without callbacks.ema")
        state = state | {name: tensor.to(state[name].dtype) for name, tensor in average.items()}
    tensors = {name.removeprefix(BACKBONE): tensor for name, tensor in state.items() if name.startswith(BACKBONE)}
    if not tensors:
        raise UserError(f"{path} contains no model: it has no tensor named {BACKBONE}*")
    return tensors


def _read_sharded(path: Path) -> dict[str, Tensor]:
    """The model's part of the `state_dict` that our FSDP2 strategy writes, and the average, without the optimizer."""
    prefix, reader = "state_dict.", FileSystemReader(path)
    state = {
        name.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith((prefix + BACKBONE, prefix + EMA)) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        load({"state_dict": state}, storage_reader=reader, no_dist=True)
    return state
