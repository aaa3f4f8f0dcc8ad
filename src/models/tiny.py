"""The tiny model for the embedded data: the LLaDA-V class with small sizes and random weights."""

from __future__ import annotations

import torch

from src.models.llada_v import LLaDAV
from src.models.tiling import AnyRes
from src.text.tokenizer import Codec


def tiny(codec: Codec, *, decoder: dict, vision: dict | None, tiling: AnyRes | None = None, seed: int = 0) -> LLaDAV:
    """A randomly initialized model; its `vocab_size` is the codec's. Leaves the global RNG state unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LLaDAV(
            decoder={**decoder, "vocab_size": codec.vocab_size},
            vision=vision,
            image_id=codec.image_id,
            tiling=tiling.to_dict() if tiling else None,
            init_std=decoder["hidden_size"] ** -0.5,
        )
