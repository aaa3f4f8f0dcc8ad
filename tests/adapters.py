"""Small models with adapters, for tests."""

from __future__ import annotations

from dataclasses import replace

import torch

from src.models.hf.folder import build_empty, describe
from src.models.llada_v import LLaDAV
from src.models.lora import UP, LoRA


def with_adapters(base: LLaDAV, lora: LoRA, *, seed: int | None = None) -> LLaDAV:
    """The same model, its weights frozen, with new adapters; with a seed these change what it computes."""
    model = build_empty(replace(describe(base), lora=lora.to_dict("base")))
    names, fresh = lora.adapted(base.state_dict())
    state = {names[name]: tensor.clone() for name, tensor in base.state_dict().items()}
    generator = torch.Generator().manual_seed(seed or 0)
    for name, tensor in fresh.items():
        state[name] = lora.initial(name, tensor.shape)
        if seed is not None and name.endswith(UP):
            state[name] = torch.randn(tensor.shape, generator=generator) * 0.1
    model.load_state_dict(state, assign=True)
    return model
