"""A stored model on the meta device, without its weights: the input of `src.training.memory_plan`.

outline("runs/mask/model")          reads only names, shapes and dtypes of the weights
outline("GSAI-ML/LLaDA-8B-Base")    downloads no weights from the hub
outline("docs/llada_v")             a folder with only a config.json is enough
Deferred("runs/mask/model", ...)    the same, and `fill` loads the weights once the model has memory
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from src.io.hub import local_folder
from src.models.hf.folder import CONFIG, build_empty, from_pretrained, load_weights
from src.models.hf.formats import recognise
from src.models.hf.weights import is_model_folder, read_dtype, reading
from src.models.llada_v import LLaDAV
from src.text.tokenizer import NEEDED, Codec


def outline(
    path: str | Path,
    *,
    codec: Codec,
    attention: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    vision: dict | None = None,
) -> LLaDAV:
    """The model that `from_pretrained` returns for the same arguments, on the meta device (`device` is ignored).

    Without weight files the dtype is `dtype` or float32, and the image mark is the codec's. Raises UserError
    as `from_pretrained` does, and if config.json is missing or does not suffice to describe the model.
    """
    path = local_folder(path, patterns=NEEDED)
    if is_model_folder(path):
        return from_pretrained(path, codec=codec, attention=attention, dtype=dtype, device="meta", vision=vision)
    with reading(path / CONFIG):
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        description = recognise(config).describe(config, {}, vision=vision, image_id=codec.image_id)
        description = replace(description.with_attention(attention), image_id=codec.image_id)
        return build_empty(description).to(read_dtype(dtype))


@dataclass(frozen=True)
class Deferred:
    """`from_pretrained` in two steps, for a model that is sharded before its memory is allocated."""

    path: str
    options: dict[str, Any]  # arguments of `outline`

    def __call__(self) -> LLaDAV:
        """The model on the meta device."""
        return outline(self.path, **self.options)

    def fill(self, model: LLaDAV) -> None:
        load_weights(model, self.path)
