"""LoRA (arXiv 2106.09685) by `peft`: the weights stay as they are, and small matrices beside them are trained.

    model: {target: src.models.hf.folder.from_pretrained, path: BASE, lora: {target: src.models.lora.LoRA, rank: 16}}

    y = W x + alpha / rank * B A x        in the chosen linear layers: W (out, in) frozen, A (rank, in), B (out, rank)

A layer `q_proj` becomes `q_proj.base_layer`, with `q_proj.lora_A.default` and `q_proj.lora_B.default` beside it. While
they are trained, A and B are float32 and W as stored; a model that only samples has one dtype. The folder of a trained
adapter (`src/models/hf/folder.py`) is one of peft's with a config.json and the tokenizer, and names its base.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.io.errors import UserError

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
PEFT = "base_model.model."  # before the names in the files of peft
DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARTS = {"decoder": "model.layers.", "vision": "vision.vision_tower.encoder.", "projector": "vision.mm_projector."}


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """What is trained, and how.

    rank, alpha: as above; dropout: of the input of A, in training; seed: of the initial A, B starts at zero
    decoder, vision: names of the linear layers with adapters, in all blocks of the decoder, of the vision tower
    projector: whether its two linear layers have adapters
    train: modules that are trained as a whole, such as `vision.mm_projector`, or `model.embed_tokens` and `lm_head`
        for a new special token

    Raises UserError for wrong numbers, and for names that the model does not have.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    decoder: tuple[str, ...] = DECODER
    vision: tuple[str, ...] = ()
    projector: bool = False
    train: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("decoder", "vision", "train"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UserError(
                "model.lora: rank must be at least 1, alpha more than 0, dropout at least 0 and less than 1, got "
                f"{self.rank}, {self.alpha}, {self.dropout}"
            )

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> LoRA:
        """The settings in a model folder's config.json, which also names the base, or in a config."""
        return cls(**{field.name: stored[field.name] for field in fields(cls) if field.name in stored})

    def to_dict(self, base: str | Path) -> dict[str, Any]:
        settings = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {"base": os.path.normpath(base), **settings}

    def layers(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The layers with adapters in a model with these tensors, by its own names."""
        layers = []
        for part, prefix in PARTS.items():
            matrices = {n.removesuffix(".weight") for n, t in tensors.items() if n.startswith(prefix) and t.ndim == 2}
            matrices = {name for name in matrices if "embedding" not in name}
            known = {name.rpartition(".")[2] for name in matrices}
            chosen = known if getattr(self, part) is True else set(getattr(self, part) or ())
            if chosen - known or (self.projector and not matrices and part == "projector"):
                wrong = ", ".join(sorted(chosen - known)) or "the projector"
                raise UserError(
                    f"model.lora.{part}: the model has no {wrong}, only {', '.join(sorted(known)) or 'none'}"
                )
            layers += sorted(name for name in matrices if name.rpartition(".")[2] in chosen)
        for name in self.train:
            if not any(tensor.startswith(f"{name}.") for tensor in tensors):
                raise UserError(f"model.lora.train: the model has no {name!r}, as it has lm_head or model.embed_tokens")
        if both := [layer for layer in layers if self.is_trained(f"{layer}.weight")]:
            raise UserError(f"model.lora.train: {both[0]} has an adapter, too: choose one of them")
        if not layers:
            raise UserError(
                "model.lora: no layer has an adapter: name some in decoder or vision, or set projector=true"
            )
        return layers

    def is_trained(self, name: str) -> bool:
        """Whether a tensor is part of the adapter: of A or B, or of a module that is trained as a whole."""
        return name.endswith((DOWN, UP)) or name.startswith(tuple(f"{module}." for module in self.train))

    def is_float32(self, name: str) -> bool:
        """Whether a tensor is float32 in training: what is trained, and all of a vision path that is trained in part.

        NOTE: the vision path must be one unit of FSDP2 (see `VisionPath`), which has one dtype.
        """
        sees = self.vision or self.projector or any(module.startswith("vision.") for module in self.train)
        return self.is_trained(name) or (bool(sees) and name.startswith("vision."))

    def adapted(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Of a base's tensors: their names in the model with adapters, and what these add, on the meta device."""
        layers = set(self.layers(tensors))
        names, added = {}, {}
        for name, tensor in tensors.items():
            layer, _, kind = name.rpartition(".")
            names[name] = f"{layer}{BASE}{kind}" if layer in layers else name
            if layer in layers and kind == "weight":
                added[layer + DOWN] = torch.empty(self.rank, tensor.shape[1], device="meta")
                added[layer + UP] = torch.empty(tensor.shape[0], self.rank, device="meta")
        return names, added

    def initial(self, name: str, shape: torch.Size) -> Tensor:
        """A as peft draws it (uniform, variance 1 / (3 in)), B zero. A function of seed and name, so of no rank."""
        if name.endswith(UP):
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + (self.seed << 32))
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def config(self, layers: list[str], *, base: str | None = None) -> Any:
        """peft's settings, for layers by name. Raises UserError without peft."""
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise UserError("LoRA needs peft: pip install 'rediff-lightning[lora]'") from error
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]  peft writes and reads any number
            lora_dropout=self.dropout,
            base_model_name_or_path=base,
            target_modules=layers,
            modules_to_save=list(self.train) or None,
        )

    def inject(self, model: Any) -> None:
        """Put adapters into a model on the meta device, and freeze all but these and `train`."""
        config = self.config(self.layers(model.state_dict()))
        config.modules_to_save = None  # they are trained in place
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
        for layer in _adapters(model):
            # NOTE: a float32 copy of each layer's input would be kept for the backward pass
            layer.cast_input_dtype_enabled = False
        for name in self.train:
            model.get_submodule(name).requires_grad_(True)

    def merge(self, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], float]:
        """The tensors without adapters, W + alpha / rank * B A in `dtype` (None: that of W); and what rounding costs.

        Modules that were trained as a whole, in float32, get that dtype, too. The second value is the rounding error of
        the sums as a share of what the adapter adds: from about 1, the adapter is lost in it.
        """
        merged, error, change = {}, 0.0, 0.0
        dtype = dtype or next(tensor.dtype for name, tensor in state.items() if BASE in name)
        for name, tensor in state.items():
            layer, adapted, kind = name.rpartition(BASE)
            if name.endswith((DOWN, UP)):
                continue
            if not adapted or kind != "weight":
                merged[name.replace(BASE, ".")] = tensor.to(dtype) if self.is_trained(name) else tensor
                continue
            delta = self.alpha / self.rank * (state[layer + UP].float() @ state[layer + DOWN].float())
            exact = tensor.float() + delta
            merged[f"{layer}.weight"] = exact.to(dtype)
            error += float((merged[f"{layer}.weight"].float() - exact).square().sum())
            change += float(delta.square().sum())
        return merged, math.sqrt(error / change) if change else 0.0


def apart(block: nn.Module) -> Iterator[list[nn.Module]]:
    """The adapters of a block, which must be FSDP2 units of their own: they are float32, the block may not be.

    NOTE: a pair A, B each, as both always run, one after the other; `keys_values` runs only some layers of a block.
    """
    for layer in _adapters(block):
        yield [layer.lora_A["default"], layer.lora_B["default"]]


def file_name(name: str) -> str:
    """The name of a tensor of an adapter in peft's file."""
    return PEFT + name.replace(".default.", ".")


def own_name(name: str) -> str:
    """The inverse of `file_name`."""
    name = name.removeprefix(PEFT)
    return name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")


def _adapters(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "lora_A"))
