"""Hugging Face model folders: our own layout, and the released ones of LLaDA-V and LLaDA-8B.

model = from_pretrained("runs/mask/model")          or a name on the hub, such as "GSAI-ML/LLaDA-8B-Instruct"
save_pretrained(model, codec, "runs/mask/model")    our own layout; `python -m src.export` writes the others
load_weights(model, folder)                         into an existing model, also one sharded by FSDP2

    config.json -> layout (src/models/hf/formats.py) -> empty model -> tensors one at a time (src/models/hf/weights.py)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from src.distributed.parallel import full_tensor, gather, is_sharded, rank
from src.io.errors import UserError
from src.io.hub import hub_name, local_folder
from src.models.hf.formats import FORMATS, Description, Format, qualify, recognise
from src.models.hf.weights import (
    DAMAGE,
    SINGLE,
    Weights,
    check_finite,
    damage_as_user_error,
    is_model_folder,
    write_weights,
)
from src.models.llada_v import LLaDAV
from src.models.sizes import check_layers, check_vision
from src.text.tokenizer import IMAGE, NO_IMAGE_TOKEN, Codec, read_backend

CONFIG = "config.json"
SHOWN = 12  # tensor names listed in an error
BLOCKS, BLOCK = 8, 1024  # `sketch` hashes this many blocks of each tensor, this many values each
EMBEDDING = "model.embed_tokens.weight"
DTYPES = ("bfloat16", "float16", "float32", "float64")


def save_pretrained(model: LLaDAV, codec: Codec, path: str | Path, *, max_shard_bytes: float = 5e9) -> None:
    """Write a model folder in our own layout, replacing an existing one; readers never see a partial folder.

    If the model is sharded, every rank must call this; rank 0 writes, gathering one file at a time.
    """
    state = model.state_dict()
    sizes = {name: tensor.nbytes for name, tensor in state.items()}
    if rank():
        for tensor in state.values():
            full_tensor(tensor)
        return
    with replacing(Path(path)) as folder:
        write_weights(
            folder,
            sizes,
            lambda names: {name: full_tensor(state[name]) for name in names},
            max_shard_bytes=max_shard_bytes,
        )
        write_config(folder, FORMATS["own"].config(describe(model)))
        codec.save(folder)


def from_pretrained(
    path: str | Path,
    *,
    codec: Codec | None = None,
    attention: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    vision: dict | None = None,
) -> LLaDAV:
    """Read a model folder, or a model from the Hugging Face hub; a local folder of that name takes precedence.

    codec: the tokenizer to be used with the model; attention: overrides the mode recorded in the checkpoint;
    dtype: of all weights, default as stored; device: default the CPU
    vision: vision tower fields that a released config.json lacks, such as num_attention_heads

    Raises UserError if the tokenizer is not the model's own, if files are missing or damaged, if the config needs
    something that is not implemented, or if tensors are missing, unexpected, non-finite or have the wrong shape.
    """
    folder = ModelFolder.open(path)
    _check_tokenizer(folder, codec)
    model = folder.empty(attention=attention, vision=vision)
    check_tensors(model, folder.shapes, folder.path)
    _allocate(model, folder, dtype=read_dtype(dtype), device=device)
    _fill(model, folder)
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Read the weights of a model folder into an allocated model, keeping the dtype and device of its parameters.

    Each rank reads its own part of a sharded parameter (DTensor), without communication. Raises UserError as
    `from_pretrained` does, ValueError for a model on the meta device, which needs `to_empty` first.
    """
    folder = ModelFolder.open(path)
    if unallocated := [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]:
        raise ValueError(f"{unallocated[0]} is on the meta device: call the model's to_empty(device=...) first")
    check_tensors(model, folder.shapes, folder.path)
    _fill(model, folder)


def fingerprint(model: nn.Module | str | Path) -> str:
    """Hash of a model's weights, which identifies it in drafts, rounds and results.

    Equal for a module and for all of its folders of the same dtype, whatever their layout and shards. If the module
    is sharded, every rank must call this.
    """
    digest, sharded = hashlib.sha256(), isinstance(model, nn.Module) and is_sharded(model)
    for name, tensor in _tensors(model):
        tensor = full_tensor(tensor.detach())
        if sharded and rank():
            continue  # only rank 0 hashes
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    value = digest.hexdigest()[:16]
    return gather(value)[0] if sharded else value


def sketch(path: str | Path) -> str:
    """Hash of a model folder's config and of blocks of every tensor: distinguishes models without a full read.

    Unlike `fingerprint` it may miss a change of only a few values; training changes values in every block.
    """
    folder = ModelFolder.open(path)
    digest = hashlib.sha256(json.dumps(folder.config, sort_keys=True).encode())
    for name in sorted(folder.names):
        tensor = folder.read(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.reshape(-1)
        last = max(0, len(values) - BLOCK)
        for start in sorted({last * number // (BLOCKS - 1) for number in range(BLOCKS)}):
            digest.update(values[start : start + BLOCK].view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ModelFolder:
    """A model folder of any layout. `open` reads only config.json and the headers of the weight files."""

    path: Path
    form: Format
    config: dict
    weights: Weights
    names: dict[str, str]  # our tensor name -> name in the files
    hub: str | None = None  # name on the hub if the folder is a download

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """Raises UserError for missing or damaged files, an unknown layout, or quantized weights."""
        hub, path = hub_name(path), local_folder(path)
        missing = [CONFIG] * (not (path / CONFIG).is_file()) + [SINGLE] * (not is_model_folder(path))
        if missing:
            raise UserError(f"{path} is not a model folder: {', '.join(missing)} not found")
        with _reading(path):
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            form = recognise(config)
        weights = Weights(path)
        with _reading(path):
            names = form.names(config, weights.shapes)
        for name in names.values():
            spec = weights.specs[name]
            if not spec.dtype.is_floating_point:
                raise UserError(
                    f"{spec.file}: {name} has dtype {spec.dtype}; quantized weights are not supported, "
                    "only floating point ones"
                )
        return cls(path, form, config, weights, names, hub)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor shapes, by our names."""
        return {ours: self.weights.specs[theirs].shape for ours, theirs in self.names.items()}

    @property
    def positions(self) -> int | None:
        """Maximum number of tokens, prompt and response, of a released model; None if its config does not say."""
        fields = self.config.get("original", {}).get("fields", {}) if self.form.name == "own" else self.config
        positions = fields.get("max_position_embeddings", fields.get("max_sequence_length"))
        return positions if type(positions) is int and positions > 0 else None

    def read(self, name: str) -> Tensor:
        """One tensor, by our name; see `Weights.read`."""
        return self.weights.read(self.names[name])

    def describe(self, *, attention: str | None = None, vision: dict | None = None) -> Description:
        """The model that config.json describes; `attention` and `vision` as in `from_pretrained`."""
        check_vision(vision)
        image_id = _image_id(self.path / "tokenizer.json")
        with _reading(self.path):
            description = self.form.describe(self.config, self.weights.shapes, vision=vision, image_id=image_id)
            check_layers({"decoder": description.decoder, "vision": description.vision}, self.names)
            decoder = {**description.decoder, **({"attention": attention} if attention else {})}
            return replace(description, decoder=decoder, original=self._qualified(description.original))

    def empty(self, *, attention: str | None = None, vision: dict | None = None) -> LLaDAV:
        """The model on the meta device."""
        description = self.describe(attention=attention, vision=vision)
        with _reading(self.path):
            return build_empty(description)

    def _qualified(self, original: dict) -> dict:
        """`original` with `auto_map` pointing to the code files on the hub, as downloads do not include them."""
        fields = original.get("fields", {})
        if not self.hub or original.get("format") != self.form.name or "auto_map" not in fields:
            return original
        return {**original, "fields": {**fields, "auto_map": qualify(fields["auto_map"], self.hub)}}


def describe(model: LLaDAV) -> Description:
    """The description of a model: everything but its weights."""
    return Description(
        decoder=model.config.to_dict(),
        vision=model.vision_config,
        image_id=model.image_id,
        tiling=model.tiling,
        original=model.original,
        response_length=model.response_length,
    )


def build_empty(description: Description) -> LLaDAV:
    """Build the described model on the meta device."""
    with torch.device("meta"):
        model = LLaDAV(
            decoder=description.decoder,
            vision=description.vision,
            image_id=description.image_id,
            tiling=description.tiling,
        )
    model.original, model.response_length = description.original, description.response_length
    return model


def check_tensors(model: nn.Module, shapes: dict[str, tuple[int, ...]], place: str | Path) -> None:
    """Raise one UserError that lists all tensors that are missing, unexpected or of the wrong shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "wrong shape:": [
            f"{name} {shapes[name]} (expected {shape})"
            for name, shape in sorted(expected.items())
            if name in shapes and shapes[name] != shape
        ],
    }
    messages = [f"{problem} {_shortened(names)}" for problem, names in problems.items() if names]
    if messages:
        raise UserError(f"the model in {place} does not match its config: {'; '.join(messages)}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `path` when the block ends; readers never see a partial folder."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(path, ignore_errors=True)
    partial.replace(path)


def write_config(folder: Path, config: dict) -> None:
    """Write config.json."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype of a name such as `bfloat16`; None stays None."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return getattr(torch, dtype)


def _allocate(
    model: nn.Module, folder: ModelFolder, *, dtype: torch.dtype | None, device: str | torch.device | None
) -> None:
    """Allocate uninitialized parameters for a model that is on the meta device."""
    for name, tensor in list(model.named_parameters()):
        stored = folder.weights.specs[folder.names[name]].dtype
        owner, _, leaf = name.rpartition(".")
        empty = torch.empty(tensor.shape, dtype=dtype or stored, device=device or "cpu")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(empty, requires_grad=tensor.requires_grad))


@torch.no_grad()
def _fill(model: nn.Module, folder: ModelFolder) -> None:
    """Copy the tensors of a folder into the parameters one at a time."""
    for name, parameter in model.state_dict(keep_vars=True).items():
        stored = folder.read(name)
        if isinstance(parameter, DTensor):
            stored, parameter = stored[_own_part(parameter)], parameter.to_local()
        parameter.copy_(stored)
        check_finite(name, parameter, folder.path)
    for module in model.modules():  # the vision tower's position ids are not stored
        buffer = dict(module.named_buffers(recurse=False)).get("position_ids")
        if buffer is not None:
            device = next(model.parameters()).device
            position_ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            module.register_buffer("position_ids", position_ids, persistent=False)


def _own_part(parameter: Any) -> tuple[slice, ...]:
    """The slice of a DTensor parameter that this rank holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # slow to import

    sizes, starts = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def _tensors(model: nn.Module | str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs sorted by name; a folder's tensors are read one at a time."""
    if isinstance(model, nn.Module):
        yield from sorted(model.state_dict().items())
        return
    folder = ModelFolder.open(model)
    for name in sorted(folder.names):
        yield name, folder.read(name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors about config.json into a UserError that names the file."""
    with damage_as_user_error(path / CONFIG):
        try:
            yield
        except DAMAGE:
            raise
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def check_vocabulary(folder: ModelFolder, codec: Codec) -> None:
    """Raise UserError if the tokenizer has ids without an embedding in the model."""
    num_ids = 1 + max(codec.tokenizer.get_vocab().values())
    num_rows = folder.shapes.get(EMBEDDING, (num_ids,))[0]
    if num_ids > num_rows:
        raise UserError(
            f"the tokenizer has ids up to {num_ids - 1}, but the model in {folder.path} has a vocabulary of "
            f"{num_rows}: it is the tokenizer of another model"
        )


def _check_tokenizer(folder: ModelFolder, codec: Codec | None) -> None:
    if not codec:
        return
    if Codec.load(folder.path).fingerprint != codec.fingerprint:
        name = codec.tokenizer.name_or_path or "the given one"
        raise UserError(
            f"the model in {folder.path} was trained with a different tokenizer than {name}, so its token ids mean "
            f"different words; set tokenizer={folder.path}, and prepare the data with it"
        )
    check_vocabulary(folder, codec)


def _image_id(tokenizer: Path) -> int:
    """The image mark of a released model: the id of its tokenizer's image token, else `NO_IMAGE_TOKEN`."""
    if not tokenizer.is_file():
        return NO_IMAGE_TOKEN
    token_id = read_backend(tokenizer).token_to_id(IMAGE)
    return NO_IMAGE_TOKEN if token_id is None else token_id


def _shortened(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:SHOWN])} and {more} more"
