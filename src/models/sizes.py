"""What the numbers of a config.json must be, said before anything is built from them."""

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
    """Raises UserError for a field of a decoder or vision tower that is no number, or no possible one.

    Fields that are absent or None are for the classes to judge. names: what the config calls a field, if it is another
    """
    told = lambda name: (names or {}).get(name, name)  # noqa: E731
    given = {name: value for name, value in fields.items() if value is not None}
    for name in COUNTS:
        if name in given and (type(given[name]) is not int or given[name] < 1):
            raise UserError(f"{told(name)} must be a whole number above 0, got {given[name]!r}")
    for name in POSITIVE:
        if name in given and (type(given[name]) not in (int, float) or not 0 < given[name] < math.inf):
            raise UserError(f"{told(name)} must be a number above 0, got {given[name]!r}")
    width, heads = given.get("hidden_size"), given.get("num_attention_heads")
    if width and heads and width % heads:
        raise UserError(f"{told('hidden_size')} {width} is not a multiple of {heads} heads")


def check_layers(parts: Mapping[str, Mapping[str, Any] | None], names: Iterable[str]) -> None:
    """Raises UserError where a part is to have more layers than there are tensors at all, before it is built.

    parts: fields of `decoder` and `vision`; names: ours of the tensors. Single missing tensors are told elsewhere.
    """
    names = list(names)
    for part, fields in parts.items():
        wanted = (fields or {}).get("num_hidden_layers")
        if type(wanted) is int and wanted > len(names):
            found = [re.match(LAYERS[part], name) for name in names]
            stored = 1 + max((int(match[1]) for match in found if match), default=-1)
            raise UserError(f"num_hidden_layers of the {part} is {wanted}, but the weights have {stored} layers")


def check_vision(vision: Any) -> None:
    """Raises UserError where `vision` is neither None nor fields of a vision tower."""
    if vision is not None and not isinstance(vision, Mapping):
        example = "{num_attention_heads: 16}"
        raise UserError(f"vision must be null or fields of the vision tower, such as {example}, got {vision!r}")
    check_sizes(vision or {})
