"""Checks of the sizes in a config.json, before a model is built from them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from src.io.errors import UserError

COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "num_channels", "image_size", "patch_size"),
)
LAYERS = {"decoder": r"model\.layers\.(\d+)\.", "vision": r"vision\.vision_tower\.encoder\.layers\.(\d+)\."}
POSITIVE = ("rms_norm_eps", "rope_theta", "layer_norm_eps")


def check_sizes(fields: Mapping[str, Any], *, names: Mapping[str, str] | None = None) -> None:
    """Raises UserError for a field of a decoder or vision tower that is not a number, or not a possible one.

    Fields that are absent or None are left to the classes. names: our name of a field -> its name in the config
    """
    config_name = lambda name: (names or {}).get(name, name)  # noqa: E731
    settings = {name: value for name, value in fields.items() if value is not None}
    for name in COUNTS:
        if name in settings and (type(settings[name]) is not int or settings[name] < 1):
            raise UserError(f"{config_name(name)} must be a whole number above 0, got {settings[name]!r}")
    for name in POSITIVE:
        if name in settings and (type(settings[name]) not in (int, float) or not 0 < settings[name] < math.inf):
            raise UserError(f"{config_name(name)} must be a number above 0, got {settings[name]!r}")
    width, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    if width and heads and width % heads:
        raise UserError(f"{config_name('hidden_size')} {width} is not a multiple of {heads} heads")


def check_layers(parts: Mapping[str, Mapping[str, Any] | None], names: Iterable[str]) -> None:
    """Raises UserError if a part has more layers than the weights have tensors, before it is built.

    parts: fields of `decoder` and `vision`; names: our names of the stored tensors. Loading reports missing tensors.
    """
    names = list(names)
    for part, fields in parts.items():
        num_layers = (fields or {}).get("num_hidden_layers")
        if type(num_layers) is int and num_layers > len(names):
            matches = [re.match(LAYERS[part], name) for name in names]
            stored = 1 + max((int(match[1]) for match in matches if match), default=-1)
            raise UserError(f"num_hidden_layers of the {part} is {num_layers}, but the weights have {stored} layers")


def check_vision(vision: Any) -> None:
    """Raises UserError if `vision` is neither None nor valid fields of a vision tower."""
    if vision is not None and not isinstance(vision, Mapping):
        example = "{num_attention_heads: 16}"
        raise UserError(f"vision must be null or fields of the vision tower, such as {example}, got {vision!r}")
    check_sizes(vision or {})
