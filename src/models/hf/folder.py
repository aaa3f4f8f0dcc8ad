"""Hugging Face model folders: our own layout, and the released ones of LLaDA-V and LLaDA-8B.

model = from_pretrained("runs/mask/model")          or a name on the hub, such as "GSAI-ML/LLaDA-8B-Instruct"
model = outline("GSAI-ML/LLaDA-8B-Instruct")        the same on the meta device, without its weights
load_weights(model, folder)                         into an existing model, also one sharded by FSDP2
save_pretrained(model, codec, "runs/mask/model")    our own layout; `python -m src.export` writes the others
from_pretrained("runs/mask/model", lora=LoRA())     with adapters to be trained (src/models/lora.py); the folder that is
                                                    saved then holds these alone, and is read like any other

    config.json -> layout (src/models/hf/formats.py) -> empty model -> tensors one at a time (src/models/hf/weights.py)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from src.distributed.parallel import full_tensor, gather, is_sharded, rank
from src.io.errors import UserError
from src.io.files import replacing
from src.io.hub import hub_name, local_folder
from src.io.settings import changes
from src.models.hf.formats import FORMATS, Description, Layout, recognise
from src.models.hf.weights import (
    ADAPTER,
    SINGLE,
    check_finite,
    is_model_folder,
    plan_shards,
    read_dtype,
    read_tensor,
    reading,
    stored_tensors,
    write_weights,
)
from src.models.llada import DecoderConfig
from src.models.llada_v import LLaDAV
from src.models.lora import DOWN, LoRA, file_name, own_name
from src.text.tokenizer import NEEDED, NO_IMAGE_TOKEN, Codec, image_mark

CONFIG = "config.json"
SHOWN = 5  # tensor names listed in an error
BLOCKS, BLOCK = 8, 1024  # `sketch` hashes this many blocks of each tensor, this many values each


def save_pretrained(model: LLaDAV, codec: Codec, path: str | Path, *, max_shard_bytes: float = 5e9) -> None:
    """Write a model folder in our own layout, replacing an existing one; readers never see a partial folder.

    If the model is sharded, every rank must call this; rank 0 writes, gathering one file at a time.
    """
    state, lora = model.state_dict(), LoRA.of(model.lora) if model.lora else None
    if lora:
        state = {file_name(name): tensor for name, tensor in state.items() if lora.is_trained(name)}
        max_shard_bytes = 1e18  # one file
    if rank():
        for name in plan_shards(state, max_shard_bytes=max_shard_bytes).tensor_to_filename:
            full_tensor(state[name])
        return
    with replacing(Path(path)) as folder:
        if lora and model.lora:
            model.lora = {**model.lora, "sketch": sketch(model.lora["base"])}
        write_weights(folder, state, max_shard_bytes=max_shard_bytes)
        write_config(folder, FORMATS["own"].config(describe(model)))
        codec.save(folder)
        if lora and model.lora:
            (folder / SINGLE).rename(folder / ADAPTER)
            layers = [name.removesuffix(DOWN) for name in model.state_dict() if name.endswith(DOWN)]
            lora.config(layers, base=model.lora["base"]).save_pretrained(folder)


def from_pretrained(
    path: str | Path,
    *,
    codec: Codec | None = None,
    attention: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    vision: dict | None = None,
    lora: LoRA | None = None,
) -> LLaDAV:
    """Read a model folder, or a model from the Hugging Face hub; a local folder of that name takes precedence.

    codec: the tokenizer to be used with the model; attention: overrides the mode recorded in the checkpoint
    dtype: of all weights, default as stored; vision: vision tower fields that a released config.json lacks
    lora: freeze the model, but for new adapters, or for those of the folder, if it is an adapter's with these settings

    Raises UserError if the tokenizer is not the model's own, if files are missing or damaged, if the config needs
    something that is not implemented, or if tensors are missing, unexpected, non-finite or have the wrong shape.
    """
    folder, dtype, device = ModelFolder.open(path, lora=lora), read_dtype(dtype), device or "cpu"
    if codec and Codec.load(folder.path).fingerprint != codec.fingerprint:
        raise UserError(
            f"the model in {folder.path} was trained with a different tokenizer than "
            f"{codec.tokenizer.name_or_path or 'the given one'}, so its token ids mean different words; set "
            f"tokenizer={folder.path}, and prepare the data with it"
        )
    if codec:
        check_vocabulary(folder, codec)
    model = folder.empty(attention=attention, vision=vision)
    check_tensors(model, folder.tensors, folder.path)
    if folder.lora and not lora:
        dtype = dtype or folder.tensors["model.norm.weight"].dtype  # of the base
    state = {}
    for name in folder.names:
        wanted = torch.float32 if lora and lora.is_float32(name) else dtype
        state[name] = folder.read(name).to(device, wanted, copy=True)  # a view of the file would change with it
        check_finite(name, state[name], folder.path)
    model.load_state_dict(state, assign=True)
    _set_position_ids(model)
    return model


def outline(
    path: str | Path,
    *,
    codec: Codec,
    attention: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    vision: dict | None = None,
    lora: LoRA | None = None,
) -> LLaDAV:
    """The model that `from_pretrained` returns for the same arguments, on the meta device (`device` is ignored).

    Downloads no weights from the hub, and a folder with only a config.json is enough. Without weight files the dtype is
    `dtype` or float32, and the image mark is the codec's.
    """
    folder = local_folder(path, patterns=NEEDED)
    options: dict[str, Any] = {"attention": attention, "vision": vision}
    if is_model_folder(folder):
        return from_pretrained(path, codec=codec, dtype=dtype, device="meta", lora=lora, **options)
    with reading(folder / CONFIG):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        description = recognise(config).describe(config, {}, vision=vision, image_id=codec.image_id)
        description = replace(description.with_attention(attention), image_id=codec.image_id)
        model = build_empty(replace(description, lora=lora and lora.to_dict(path))).to(read_dtype(dtype))
        for name, parameter in model.named_parameters():
            if lora and lora.is_float32(name):
                parameter.data = parameter.data.float()
        return model


@dataclass(frozen=True)
class Deferred:
    """`from_pretrained` in two steps, for a model that is sharded before its memory is allocated."""

    path: str
    options: dict[str, Any]  # arguments of `outline`

    def __call__(self) -> LLaDAV:
        return outline(self.path, **self.options)

    def fill(self, model: LLaDAV) -> None:
        load_weights(model, self.path, lora=self.options.get("lora"))


@torch.no_grad()
def load_weights(model: LLaDAV, path: str | Path, *, lora: LoRA | None = None) -> None:
    """Read the weights of a model folder into an allocated model, keeping the dtype and device of its parameters.

    Each rank reads its own part of a sharded parameter (DTensor), without communication. A model on the meta device
    needs `to_empty` first. Raises UserError as `from_pretrained` does.
    """
    folder = ModelFolder.open(path, lora=lora)
    check_tensors(model, folder.tensors, folder.path)
    for name, parameter in model.state_dict(keep_vars=True).items():
        assert not parameter.is_meta, f"{name} is on the meta device"  # a copy into it would go nowhere
        stored = folder.read(name)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            stored = distribute_tensor(stored, mesh, placements, src_data_rank=None).to_local()
            parameter = parameter.to_local()
        parameter.copy_(stored)
        check_finite(name, parameter, folder.path)
    _set_position_ids(model)


def fingerprint(model: nn.Module | str | Path) -> str:
    """Hash of a model's weights, which identifies it in drafts, rounds and results.

    Equal for a module and for all of its folders of the same dtype, whatever their layout and shards. If the module
    is sharded, every rank must call this.
    """
    if isinstance(model, nn.Module):
        tensors, sharded = sorted(model.state_dict().items()), is_sharded(model)
    else:
        tensors, sharded = ModelFolder.open(model).sorted_tensors(), False
    digest = hashlib.sha256()
    for name, tensor in tensors:
        tensor = full_tensor(tensor.detach())
        if sharded and rank():
            continue  # only rank 0 hashes
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    value = digest.hexdigest()[:16]
    return gather(value)[0] if sharded else value


def sketch(path: str | Path) -> str:
    """Hash of a model folder's config and of blocks of every tensor: tells trained models apart without a full read."""
    folder = ModelFolder.open(path)
    digest = hashlib.sha256(json.dumps(folder.config, sort_keys=True).encode())
    for name, tensor in folder.sorted_tensors():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.reshape(-1)
        last = max(0, len(values) - BLOCK)
        for start in sorted({last * number // (BLOCKS - 1) for number in range(BLOCKS)}):
            digest.update(values[start : start + BLOCK].view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ModelFolder:
    """A model folder of any layout. `open` reads only config.json and the headers of the weight files.

    That of an adapter has the tensors of its base, too, by their names in the model with adapters.
    """

    path: Path
    form: Layout
    config: dict
    stored: dict[str, tuple[Path, Tensor]]  # name in the files -> file, tensor on the meta device
    names: dict[str, str]  # our tensor name -> name in the files
    hub: str | None = None  # name on the hub if the folder is a download
    lora: dict[str, Any] | None = None  # `Description.lora`
    fresh: dict[str, Tensor] = field(default_factory=dict)  # tensors of new adapters, on the meta device

    @classmethod
    def open(cls, path: str | Path, *, lora: LoRA | None = None) -> ModelFolder:
        """lora: of new adapters, or those that the folder must have.

        Raises UserError for missing or damaged files, an unknown layout, quantized weights, or other adapters.
        """
        given, hub, path = path, hub_name(path), local_folder(path)
        if not ((path / CONFIG).is_file() and is_model_folder(path)):
            raise UserError(f"{path} is not a model folder: it needs {CONFIG}, and model.safetensors or its index")
        with reading(path / CONFIG):
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        form, stored = recognise(config), stored_tensors(path)
        if config.get("lora"):
            return cls._open_adapter(path, config, stored, lora)
        shapes = {name: tuple(tensor.shape) for name, (_, tensor) in stored.items()}
        folder = cls(path, form, config, stored, form.names(config, shapes), hub)
        if lora is None:
            return folder
        adapted, fresh = lora.adapted(folder.tensors)
        names = {adapted[ours]: theirs for ours, theirs in folder.names.items()}
        return replace(folder, names={**names, **dict.fromkeys(fresh, "")}, lora=lora.to_dict(given), fresh=fresh)

    @classmethod
    def _open_adapter(cls, path: Path, config: dict, stored: dict, lora: LoRA | None) -> ModelFolder:
        settings, base = LoRA.of(config["lora"]), config["lora"]["base"]
        configured = replace(lora, seed=settings.seed) if lora else settings
        same = replace(configured, dropout=settings.dropout)  # which may differ: no tensor depends on it
        if changed := changes(settings.to_dict(""), same.to_dict(""), "in the folder"):
            raise UserError(f"{path} holds an adapter with other settings than model.lora ({changed}): use its own")
        try:
            folder = cls.open(base, lora=settings)
            is_same = config["lora"]["sketch"] == sketch(base)
        except UserError as error:
            raise UserError(
                f"{path} is an adapter, and its base cannot be read (config.json, lora.base): {error}"
            ) from error
        if not is_same:
            raise UserError(f"{path} is an adapter of other weights than those that are in {base} now")
        names = {**folder.names, **{own_name(name): name for name in stored}}
        used = {**config["lora"], "dropout": configured.dropout}
        return cls(path, FORMATS["own"], config, {**folder.stored, **stored}, names, lora=used)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by our names, on the meta device."""
        return {ours: self.stored[theirs][1] if theirs else self.fresh[ours] for ours, theirs in self.names.items()}

    @property
    def positions(self) -> int | None:
        """Maximum number of tokens, prompt and response, of a released model; None if its config does not say."""
        fields = self.config.get("original", {}).get("fields", {}) if self.form.name == "own" else self.config
        return fields.get("max_position_embeddings", fields.get("max_sequence_length"))

    def read(self, name: str) -> Tensor:
        """One tensor, by our name, as a view of the memory-mapped file; that of a new adapter is computed."""
        theirs = self.names[name]
        if self.lora and not theirs:
            return LoRA.of(self.lora).initial(name, self.fresh[name].shape)
        return read_tensor(self.stored[theirs][0], theirs)

    def sorted_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(our name, tensor) pairs, read one at a time."""
        for name in sorted(self.names):
            yield name, self.read(name)

    def describe(self, *, attention: str | None = None, vision: dict | None = None) -> Description:
        """The model that config.json describes; `attention` and `vision` as in `from_pretrained`."""
        config = self.config
        if self.hub and "auto_map" in config:  # a download omits the code files, so they are named there
            config = {**config, "auto_map": _on_hub(config["auto_map"], self.hub)}
        shapes = {name: tuple(tensor.shape) for name, (_, tensor) in self.stored.items()}
        image_id = NO_IMAGE_TOKEN if self.form.name == "own" else image_mark(self.path)
        with reading(self.path / CONFIG):
            description = self.form.describe(config, shapes, vision=vision, image_id=image_id)
            DecoderConfig(**description.decoder)  # refuses missing and unknown fields
        return replace(description.with_attention(attention), lora=self.lora)

    def empty(self, *, attention: str | None = None, vision: dict | None = None) -> LLaDAV:
        return build_empty(self.describe(attention=attention, vision=vision))


def describe(model: LLaDAV) -> Description:
    return Description(
        decoder=model.config.to_dict(),
        vision=model.vision_config,
        image_id=model.image_id,
        tiling=model.tiling,
        original=model.original,
        response_length=model.response_length,
        lora=model.lora,
    )


def build_empty(description: Description) -> LLaDAV:
    """The described model on the meta device."""
    arguments = {name: getattr(description, name) for name in ("decoder", "vision", "image_id", "tiling")}
    with torch.device("meta"):
        model = LLaDAV(**arguments)
    model.original, model.response_length = description.original, description.response_length
    if description.lora:
        model.lora = description.lora
        LoRA.of(description.lora).inject(model)
    return model


def check_tensors(model: nn.Module, stored: Mapping[str, Tensor], place: str | Path) -> None:
    """Raise one UserError that lists the tensors that are missing, unexpected or of the wrong shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    problems = [
        f"{name} is {shapes.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}"
        for name in sorted(expected.keys() | shapes.keys())
        if shapes.get(name) != expected.get(name)
    ]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(f"the model in {place} does not match its config: {'; '.join(problems[:SHOWN])}{more}")


def check_vocabulary(folder: ModelFolder, codec: Codec) -> None:
    """Raise UserError if the tokenizer has ids without an embedding in the model."""
    largest = max(codec.tokenizer.get_vocab().values())
    num_rows = len(folder.tensors["model.embed_tokens.weight"])
    if largest >= num_rows:
        raise UserError(
            f"the tokenizer has ids up to {largest}, but the model in {folder.path} has a vocabulary of "
            f"{num_rows}: it is the tokenizer of another model"
        )


def write_config(folder: Path, config: dict) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _set_position_ids(model: LLaDAV) -> None:
    """Position ids of the vision tower are a buffer that no file stores."""
    if model.vision:
        embeddings: Any = model.vision.vision_tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=model.lm_head.weight.device)[None]


def _on_hub(value: Any, hub: str) -> Any:
    """`auto_map` with the hub name prefixed to each class, so that the classes load from any folder."""
    if isinstance(value, dict):
        return {key: _on_hub(item, hub) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_hub(item, hub) for item in value]
    return value if value is None or "--" in value else f"{hub}--{value}"
