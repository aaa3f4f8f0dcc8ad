"""Model folders in the Hugging Face layout: our own, or those of LLaDA-V and LLaDA-8B as they were released.

model = from_pretrained("runs/mask/model")          or a name on the hub, such as "GSAI-ML/LLaDA-8B-Instruct"
save_pretrained(model, codec, "runs/mask/model")    our own layout; `python -m src.export` writes the others
load_weights(model, folder)                         into a model that is there, also one that FSDP2 has sharded

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

from src.distributed.parallel import gather, is_sharded, rank, whole
from src.io.errors import UserError
from src.io.hub import hub_name, local_folder
from src.models.hf.formats import FORMATS, Description, Format, qualify, recognise
from src.models.hf.weights import DAMAGE, SINGLE, Weights, check_finite, explained, is_model_folder, write_weights
from src.models.llada_v import LLaDAV
from src.models.sizes import check_layers, check_vision
from src.text.tokenizer import IMAGE, NO_IMAGE_TOKEN, Codec, read_backend

CONFIG = "config.json"
SHOWN = 12  # names of tensors in an error
BLOCKS, BLOCK = 8, 1024  # blocks of a tensor in a sketch, and values of each
EMBEDDING = "model.embed_tokens.weight"
KINDS = ("bfloat16", "float16", "float32", "float64")


def save_pretrained(model: LLaDAV, codec: Codec, path: str | Path, *, max_shard_bytes: float = 5e9) -> None:
    """Write a model folder in our own layout; a reader never sees half of it. An existing folder is replaced.

    Of a model that ranks share, all of them have to call it; rank 0 gathers a file at a time, and writes.
    """
    state = model.state_dict()
    sizes = {name: tensor.nbytes for name, tensor in state.items()}
    if rank():
        for tensor in state.values():
            whole(tensor)
        return
    with replacing(Path(path)) as folder:
        write_weights(
            folder, sizes, lambda names: {name: whole(state[name]) for name in names}, max_shard_bytes=max_shard_bytes
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
    """Read a model folder, or a model of the Hugging Face hub by its name; a folder of that name here goes first.

    codec: the tokenizer that the model will be used with; attention: overrides the mode that the checkpoint records;
    dtype: of all weights, default as they are stored; device: where they go, default the CPU
    vision: fields of the vision tower that the config.json of an original lacks, such as num_attention_heads

    Raises UserError when the tokenizer is not the model's own, when files are missing or damaged, when the config asks
    for something that is not implemented, or when tensors are missing, unexpected, of another shape or not finite.
    """
    folder = ModelFolder.open(path)
    _check_tokenizer(folder, codec)
    model = folder.empty(attention=attention, vision=vision)
    check_tensors(model, folder.shapes, folder.path)
    _allocate(model, folder, dtype=read_dtype(dtype), device=device)
    _fill(model, folder)
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Read the weights of a model folder into a model that has memory, in the dtype and place of its parameters.

    Of a parameter that is sharded (DTensor) each rank reads its own part; the ranks need not meet. A model made on the
    meta device needs `to_empty` first. Raises UserError as `from_pretrained` does.
    """
    folder = ModelFolder.open(path)
    if bare := [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]:
        raise ValueError(f"{bare[0]} is on the meta device: call the model's to_empty(device=...) first")
    check_tensors(model, folder.shapes, folder.path)
    _fill(model, folder)


def fingerprint(model: nn.Module | str | Path) -> str:
    """Hash of a model's weights: names it in drafts, rounds and results.

    The same for a module and for every folder of it, whatever the layout and the shards, as long as the dtype is. Of a
    module that ranks share, all of them have to ask.
    """
    digest, shared = hashlib.sha256(), isinstance(model, nn.Module) and is_sharded(model)
    for name, tensor in _tensors(model):
        tensor = whole(tensor.detach())
        if shared and rank():
            continue  # rank 0 tells
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    found = digest.hexdigest()[:16]
    return gather(found)[0] if shared else found


def sketch(path: str | Path) -> str:
    """Hash of a model folder's config and of blocks of every tensor: tells models apart without reading all of them.

    Unlike `fingerprint` it may miss a change of a few values only; training changes values in every block.
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
    """A model folder of any layout. Nothing but config.json and the headers of the weights is read."""

    path: Path
    form: Format
    config: dict
    weights: Weights
    names: dict[str, str]  # our name of a tensor -> its name in the files
    hub: str | None = None  # its name, if it is a download

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """Raises UserError when files are missing or damaged, of an unknown layout, or hold quantized weights."""
        hub, path = hub_name(path), local_folder(path)
        absent = [CONFIG] * (not (path / CONFIG).is_file()) + [SINGLE] * (not is_model_folder(path))
        if absent:
            raise UserError(f"{path} is not a model folder: {', '.join(absent)} not found")
        with _reading(path):
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            form = recognise(config)
        weights = Weights(path)
        with _reading(path):
            names = form.names(config, weights.shapes)
        for name in names.values():
            if not weights.specs[name].dtype.is_floating_point:
                told = f"{weights.specs[name].file}: {name} has dtype {weights.specs[name].dtype}"
                raise UserError(f"{told}; only weights in floating point are implemented, no quantized ones")
        return cls(path, form, config, weights, names, hub)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Under our names."""
        return {ours: self.weights.specs[theirs].shape for ours, theirs in self.names.items()}

    @property
    def positions(self) -> int | None:
        """For how many tokens, prompt and response, an original model was made; None where its config is silent."""
        fields = self.config.get("original", {}).get("fields", {}) if self.form.name == "own" else self.config
        found = fields.get("max_position_embeddings", fields.get("max_sequence_length"))
        return found if type(found) is int and found > 0 else None

    def read(self, name: str) -> Tensor:
        """A tensor by our name; see `Weights.read`."""
        return self.weights.read(self.names[name])

    def describe(self, *, attention: str | None = None, vision: dict | None = None) -> Description:
        """What config.json says, `attention` and `vision` as for `from_pretrained`."""
        check_vision(vision)
        image_id = _image_id(self.path / "tokenizer.json")
        with _reading(self.path):
            found = self.form.describe(self.config, self.weights.shapes, vision=vision, image_id=image_id)
            check_layers({"decoder": found.decoder, "vision": found.vision}, self.names)
            decoder = {**found.decoder, **({"attention": attention} if attention else {})}
            return replace(found, decoder=decoder, original=self._from_hub(found.original))

    def empty(self, *, attention: str | None = None, vision: dict | None = None) -> LLaDAV:
        """The model on the meta device."""
        description = self.describe(attention=attention, vision=vision)
        with _reading(self.path):
            return build_empty(description)

    def _from_hub(self, original: dict) -> dict:
        """The same with `auto_map` naming the program files on the hub: a download is without them."""
        fields = original.get("fields", {})
        if not self.hub or original.get("format") != self.form.name or "auto_map" not in fields:
            return original
        return {**original, "fields": {**fields, "auto_map": qualify(fields["auto_map"], self.hub)}}


def describe(model: LLaDAV) -> Description:
    """What makes a model besides its weights."""
    return Description(
        decoder=model.config.to_dict(),
        vision=model.vision_config,
        image_id=model.image_id,
        tiling=model.tiling,
        original=model.original,
        response_length=model.response_length,
    )


def build_empty(description: Description) -> LLaDAV:
    """The model of a description, on the meta device."""
    with torch.device("meta"):
        model = LLaDAV(
            decoder=description.decoder,
            vision=description.vision,
            image_id=description.image_id,
            tiling=description.tiling,
        )
    model.original, model.response_length = description.original, description.response_length
    return model


def check_tensors(model: nn.Module, found: dict[str, tuple[int, ...]], place: str | Path) -> None:
    """Raise one ValueError about all tensors that are missing, unexpected or of another shape than the model's."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {found[name]} (expected {shape})"
            for name, shape in sorted(expected.items())
            if name in found and found[name] != shape
        ],
    }
    told = [f"{kind} {_some(names)}" for kind, names in problems.items() if names]
    if told:
        raise UserError(f"the model in {place} does not fit its config: {'; '.join(told)}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` when the block is done: a reader never sees half of it."""
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


def read_dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    """`bfloat16` and the like as torch's own; None stays None."""
    if given is None or isinstance(given, torch.dtype):
        return given
    if given not in KINDS:
        raise UserError(f"dtype must be one of {', '.join(KINDS)}, got {given!r}")
    return getattr(torch, given)


def _allocate(
    model: nn.Module, folder: ModelFolder, *, dtype: torch.dtype | None, device: str | torch.device | None
) -> None:
    """Give memory to a model that is on the meta device. What is in it counts only once it is written."""
    for name, tensor in list(model.named_parameters()):
        stored = folder.weights.specs[folder.names[name]].dtype
        owner, _, leaf = name.rpartition(".")
        empty = torch.empty(tensor.shape, dtype=dtype or stored, device=device or "cpu")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(empty, requires_grad=tensor.requires_grad))


@torch.no_grad()
def _fill(model: nn.Module, folder: ModelFolder) -> None:
    """Copy the tensors of a folder into the parameters, one at a time."""
    for name, parameter in model.state_dict(keep_vars=True).items():
        stored = folder.read(name)
        if isinstance(parameter, DTensor):
            stored, parameter = stored[_own_part(parameter)], parameter.to_local()
        parameter.copy_(stored)
        check_finite(name, parameter, folder.path)
    for module in model.modules():  # of the vision tower; they are in no file
        places = dict(module.named_buffers(recurse=False)).get("position_ids")
        if places is not None:
            device = next(model.parameters()).device
            numbers = torch.arange(places.shape[-1], device=device).expand(places.shape)
            module.register_buffer("position_ids", numbers, persistent=False)


def _own_part(parameter: Any) -> tuple[slice, ...]:
    """The part of a sharded parameter, a DTensor, that this rank holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # slow to import

    sizes, starts = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def _tensors(model: nn.Module | str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in order of the names; those of a folder are read one at a time."""
    if isinstance(model, nn.Module):
        yield from sorted(model.state_dict().items())
        return
    folder = ModelFolder.open(model)
    for name in sorted(folder.names):
        yield name, folder.read(name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What is wrong with config.json, as a ValueError that names it."""
    with explained(path / CONFIG):
        try:
            yield
        except DAMAGE:
            raise
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def check_vocabulary(folder: ModelFolder, codec: Codec) -> None:
    """Raises UserError where the tokenizer has ids that the model has no embedding of."""
    num_ids = 1 + max(codec.tokenizer.get_vocab().values())
    num_rows = folder.shapes.get(EMBEDDING, (num_ids,))[0]
    if num_ids > num_rows:
        raise UserError(
            f"the tokenizer has ids up to {num_ids - 1}, but the model in {folder.path} a vocabulary of {num_rows}: "
            "it is the tokenizer of another model"
        )


def _check_tokenizer(folder: ModelFolder, codec: Codec | None) -> None:
    if not codec:
        return
    if Codec.load(folder.path).fingerprint != codec.fingerprint:
        given = codec.tokenizer.name_or_path or "the given one"
        raise UserError(
            f"the model in {folder.path} was trained with another tokenizer than {given}: its token ids mean other "
            f"words; set tokenizer={folder.path}, and prepare the data with it"
        )
    check_vocabulary(folder, codec)


def _image_id(tokenizer: Path) -> int:
    """The image mark of an original model: the id of its tokenizer's image token, if it has one."""
    if not tokenizer.is_file():
        return NO_IMAGE_TOKEN
    found = read_backend(tokenizer).token_to_id(IMAGE)
    return NO_IMAGE_TOKEN if found is None else found


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:SHOWN])} and {more} more"
