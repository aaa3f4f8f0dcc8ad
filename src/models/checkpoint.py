"""Model folders: config.json, model.safetensors and the tokenizer files, in our own Hugging Face layout.

    save_pretrained(model, codec, "runs/mask/model")
    model = from_pretrained("runs/mask/model")
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
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


def from_pretrained(path: str | Path, *, attention: str | None = None) -> LLaDAV:
    """Read a model folder. `attention` overrides the attention mode that the checkpoint records.

    Raises ValueError when files are missing, or when tensors are missing, unexpected or of another shape.
    """
    path = Path(path)
    absent = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
    if absent:
        raise ValueError(f"{path} is not a model folder: {', '.join(absent)} not found")
    config = json.loads((path / "config.json").read_text())
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{path}/config.json has model_type {config.get('model_type')!r}, expected {MODEL_TYPE!r}")
    decoder = {**config["decoder"], **({"attention": attention} if attention else {})}
    with torch.device("meta"):
        model = LLaDAV(decoder=decoder, vision=config["vision"], image_id=config["image_id"])
    state = load_file(path / "model.safetensors")
    _check(model, state, path)
    model.load_state_dict(state, assign=True)
    _restore_buffers(model)
    if model.vision:
        model.vision.vision_tower.post_layernorm.requires_grad_(False)
    return model


def fingerprint(path: str | Path) -> str:
    """Hash of a model folder's weights: names the model in drafts, rounds and results."""
    digest = hashlib.sha256()
    with (Path(path) / "model.safetensors").open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


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
