"""Checks of the sizes of a decoder or vision tower, before a model is built from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from src.io.errors import UserError

COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "num_channels", "image_size", "patch_size"),
)
POSITIVE = ("rms_norm_eps", "rope_theta", "layer_norm_eps")


def check_sizes(fields: Mapping[str, Any]) -> None:
    """Raises UserError for a size that is not a possible number. Fields that are None are left to the classes."""
    for name, value in fields.items():
        if name in COUNTS and value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{name} must be a whole number above 0, got {value!r}")
        if name in POSITIVE and value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise UserError(f"{name} must be a number above 0, got {value!r}")


def check_vision(vision: Any) -> None:
    """Raises UserError if `vision` is neither None nor valid fields of a vision tower."""
    if vision is not None and not isinstance(vision, Mapping):
        example = "{num_attention_heads: 16}"
        raise UserError(f"vision must be null or fields of the vision tower, such as {example}, got {vision!r}")
    check_sizes(vision or {})
