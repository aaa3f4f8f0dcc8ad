"""The model of a folder without its weights, on the meta device: what `src.training.memory_plan` plans the memory of.

outline("runs/mask/model")          of the weights only names, shapes and types are read
outline("GSAI-ML/LLaDA-8B-Base")    of a name on the hub no weights are downloaded
Deferred("runs/mask/model", ...)    the same, to be filled where it has memory
outline("docs/llada_v")             a folder may hold nothing but config.json, before a model is downloaded
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.io.errors import UserError
from src.io.hub import local_folder
from src.models.hf.folder import CONFIG, build_empty, from_pretrained, load_weights, read_dtype
from src.models.hf.formats import recognise
from src.models.hf.weights import explained, is_model_folder
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
    """What `from_pretrained` makes of the same arguments, without data, wherever `device` would put it.

    Where there are no weights the types are `dtype` or float32, and the image mark is the codec's. Raises UserError as
    `from_pretrained` does, and where config.json is not here or does not describe the model without the weights.
    """
    path = local_folder(path, patterns=NEEDED)
    if is_model_folder(path):
        return from_pretrained(path, codec=codec, attention=attention, dtype=dtype, device="meta", vision=vision)
    file = path / CONFIG
    if not file.is_file():
        raise UserError(f"a plan needs the model's {CONFIG}, and there is no {file}")
    with explained(file):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.get("mm_vision_tower"):
            raise UserError(
                f"{file} names a vision tower, and only the weights tell its sizes: download the whole model first "
                "(hf download OWNER/NAME), or plan with a folder of our own layout, such as docs/llada_v"
            )
        found = recognise(config).describe(config, {}, vision=vision, image_id=codec.image_id)
        decoder = {**found.decoder, **({"attention": attention} if attention else {})}
        return build_empty(replace(found, decoder=decoder, image_id=codec.image_id)).to(read_dtype(dtype))


@dataclass(frozen=True)
class Deferred:
    """`from_pretrained` in two steps, for a model that is shared among ranks before it has memory.

    options: the arguments of `outline`
    """

    path: str
    options: dict[str, Any]

    def __call__(self) -> LLaDAV:
        """The model on the meta device."""
        return outline(self.path, **self.options)

    def fill(self, model: nn.Module) -> None:
        """Write the weights, of a shared model each rank its own part."""
        load_weights(model, self.path)
