"""Model folders: config.json, model.safetensors and the tokenizer files, in our own Hugging Face layout.

save_pretrained(model, codec, "runs/mask/model")
model = from_pretrained("runs/mask/model")
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from src.models.llada_v import LLaDAV
from src.tokenizer import Codec

MODEL_TYPE = "rediff_llada_v"


def save_pretrained(model: LLaDAV, codec: Codec, path: str | Path) -> None:
    """Write a model folder; a reader never sees half of it. An existing folder is replaced."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(_describe(model), indent=2) + "\n")
    codec.save(partial)
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(path, ignore_errors=True)
    partial.replace(path)


def from_pretrained(path: str | Path, *, codec: Codec | None = None, attention: str | None = None) -> LLaDAV:
    """Read a model folder. `attention` overrides the attention mode that the checkpoint records.

    codec: the tokenizer that the model will be used with. Raises ValueError when it is not the model's own, when files
    are missing or damaged, or when tensors are missing, unexpected or of another shape.
    """
    path = Path(path)
    absent = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
    if absent:
        raise ValueError(f"{path} is not a model folder: {', '.join(absent)} not found")
    _check_tokenizer(path, codec)
    with _explained(path / "config.json"):
        model = _empty(path, attention)
    with _explained(path / "model.safetensors"):
        state = load_file(path / "model.safetensors")
    _check(model, state, path)
    model.load_state_dict(state, assign=True)
    _restore_buffers(model)
    if model.vision:
        model.vision.vision_tower.post_layernorm.requires_grad_(False)
    return model


def fingerprint(model: nn.Module | str | Path) -> str:
    """Hash of a model's weights: names it in drafts, rounds and results. The same for a module and for its folder."""
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensors(model: nn.Module | str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors in order of the names; those of a folder are read one at a time."""
    if isinstance(model, nn.Module):
        yield from sorted(model.state_dict().items())
        return
    path = Path(model) / "model.safetensors"
    with _explained(path), safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def _empty(path: Path, attention: str | None) -> LLaDAV:
    """The model that config.json describes, on the meta device."""
    config = json.loads((path / "config.json").read_text())
    if config["model_type"] != MODEL_TYPE:
        raise ValueError(f"{path}/config.json has model_type {config['model_type']!r}, expected {MODEL_TYPE!r}")
    decoder = {**config["decoder"], **({"attention": attention} if attention else {})}
    with torch.device("meta"):
        return LLaDAV(decoder=decoder, vision=config["vision"], image_id=config["image_id"])


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """What a reader raises about a damaged file, as a ValueError that names the file."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error})") from error


def _check_tokenizer(path: Path, codec: Codec | None) -> None:
    if codec and Codec.load(path).fingerprint != codec.fingerprint:
        given = codec.tokenizer.name_or_path or "the given one"
        raise ValueError(
            f"the model in {path} was trained with another tokenizer than {given}: its token ids mean other words; "
            f"set tokenizer={path}, and prepare the data with it"
        )


def _describe(model: LLaDAV) -> dict:
    return {
        "model_type": MODEL_TYPE,
        "decoder": model.config.to_dict(),
        "vision": model.vision_config,
        "image_id": model.image_id,
    }


def _check(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise ValueError(f"{path}/model.safetensors does not fit its config: " + "; ".join(sorted(problems)))


def _restore_buffers(model: nn.Module) -> None:
    """Position ids of the vision tower are no part of the file; they were left on the meta device."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(name, torch.arange(buffer.shape[-1]).expand(buffer.shape), persistent=False)
