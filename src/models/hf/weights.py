"""Tensors of a model folder: model.safetensors, or the shards listed in model.safetensors.index.json.

weights = Weights(folder)                 names, shapes and dtypes; only headers are read
weights.read("lm_head.weight")            one tensor
write_weights(folder, {name: bytes}, read, max_shard_bytes=5e9)

Reading holds one tensor in memory, writing one shard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from src.io.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
DAMAGE = (
    *(json.JSONDecodeError, UnicodeDecodeError, SafetensorError),
    *(KeyError, TypeError, AttributeError, OSError),
)


@dataclass(frozen=True)
class Spec:
    """A stored tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Weights:
    """The tensors of a model folder. Raises UserError that names the missing or damaged file."""

    def __init__(self, folder: Path) -> None:
        self.specs: dict[str, Spec] = {}
        for file in weight_files(folder):
            with damage_as_user_error(file):
                specs = _header(file)
            if duplicates := sorted(specs.keys() & self.specs.keys()):
                raise UserError(f"{file} contains {duplicates[0]}, and so does {self.specs[duplicates[0]].file.name}")
            self.specs |= specs

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.specs.items()}

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, a memory-mapped view of the file: only what you copy is read from disk.

        The file is reopened for every tensor, so that pages already read do not stay in memory.
        """
        file = self.specs[name].file
        with damage_as_user_error(file), safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)


def is_model_folder(folder: str | Path) -> bool:
    """Whether a folder contains the weights of a model."""
    return any((Path(folder) / name).is_file() for name in (SINGLE, INDEX))


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder. Raises UserError if the index is damaged or lists missing files."""
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return [folder / SINGLE]
    with damage_as_user_error(index):
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{index} is damaged: {outside[0]!r} is not the name of a file in its folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{index} lists {', '.join(missing)}, not found in {folder}: the download or copy is incomplete"
        )
    return [folder / name for name in names]


def write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    read: Callable[[list[str]], Mapping[str, Tensor]],
    *,
    max_shard_bytes: float,
) -> None:
    """Write tensors as one file, or as shards of up to `max_shard_bytes` and an index.

    sizes: bytes of each tensor, in shard order; read: returns the tensors of a shard. A tensor larger than the limit
    gets a shard of its own.
    """
    shards = _assign_shards(sizes, max_shard_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [SINGLE]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in read(names).items()}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"{folder / file} cannot be written: {error}") from error
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors makes it readable by its owner only
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def check_finite(name: str, tensor: Tensor, place: str | Path) -> None:
    """Raise UserError if a tensor has NaN or infinite values. One pass, without a copy."""
    if tensor.is_meta or not tensor.numel():
        return
    if not all(math.isfinite(extreme) for extreme in torch.stack(tensor.aminmax()).tolist()):
        raise UserError(
            f"{name} of the model in {place} has NaN or infinite values as {str(tensor.dtype).removeprefix('torch.')}"
        )


@contextmanager
def damage_as_user_error(file: Path) -> Iterator[None]:
    """Turn errors about a damaged file into a UserError that names it."""
    try:
        yield
    except DAMAGE as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error})") from error


def _header(file: Path) -> dict[str, Spec]:
    specs = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            tensor = opened.get_slice(name)
            specs[name] = Spec(file, tuple(tensor.get_shape()), _dtype(file, name, tensor.get_dtype()))
    return specs


def _dtype(file: Path, name: str, dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise UserError(f"{file}: {name} has dtype {dtype}, which is not supported; supported: {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _assign_shards(sizes: Mapping[str, int], limit: float) -> list[list[str]]:
    """Tensor names of each shard."""
    if limit < 1:
        raise UserError(f"max_shard_bytes must be at least 1, got {limit}")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
