"""The vision tower of a released model, whose config.json names the tower but not its sizes.

    tower = StoredTower(config, shapes, prefix)
    tower.describe({"num_attention_heads": 16}, grids)     fields of transformers' SiglipVisionConfig
    tower.unused()                                         names of tensors that the released model never uses

Sizes come from the tensor shapes, the tile size from the tile grids. The number of heads, which no tensor shows, comes
from the argument of `describe`, from a nested `vision_config`, or from the tower's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from src.io.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
KNOWN = {"so400m": {"num_attention_heads": 16, "num_hidden_layers": 27}}  # part of a tower's name -> its fields
DERIVED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_channels", "patch_size", "image_size")
PATCHES = "embeddings.patch_embedding.weight"  # (hidden_size, num_channels, patch_size, patch_size)
FIELDS = (*DERIVED, "num_attention_heads", "layer_norm_eps", "hidden_act", "attention_dropout")


class StoredTower:
    """The tensors named `prefix`... of a folder whose config.json names a tower.

    The released model drops the last layer and the pooling head of the tower (`mm_vision_select_layer` -2). Released
    files omit them; where they are stored they are ignored. In `vision_config`, and in the argument of `describe`,
    `num_hidden_layers` includes the last layer, as in the tower's own config.
    """

    def __init__(self, config: dict, shapes: Shapes, prefix: str) -> None:
        self.title = str(config.get("mm_vision_tower"))
        nested = {key: value for key, value in (config.get("vision_config") or {}).items() if key in FIELDS}
        known = next((fields for part, fields in KNOWN.items() if part in self.title.lower()), {})
        self.fields: dict[str, Any] = {**known, **nested}
        self.shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        self.prefix = prefix

    @property
    def layers(self) -> int:
        """Number of layers used."""
        if "num_hidden_layers" in self.fields:
            return self.fields["num_hidden_layers"] - 1
        stored = 1 + max((_layer(name) for name in self.shapes), default=-1)
        return stored - any(name.startswith("head.") for name in self.shapes)

    def unused(self) -> set[str]:
        """Names, as in the files, of the pooling head's tensors and of layers behind the last one used."""
        layers = self.layers
        return {self.prefix + name for name in self.shapes if name.startswith("head.") or _layer(name) >= layers}

    def describe(self, overrides: Mapping[str, Any], grids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """All fields of the tower."""
        if unknown := sorted(overrides.keys() - set(FIELDS)):
            raise UserError(f"vision has no field {unknown[0]!r}; its fields are {', '.join(FIELDS)}")
        if PATCHES not in self.shapes:
            raise UserError(
                f"config.json names the vision tower {self.title!r}, whose sizes are known only from the weights, but "
                "there are none of it: download the whole model (hf download OWNER/NAME)"
            )
        # 1. What is given wins; where it contradicts the weights, loading reports their shapes
        given = {**self.fields, **overrides}
        hidden_size, num_channels, patch_size, _ = self.shapes[PATCHES]
        sizes = {"hidden_size": hidden_size, "num_channels": num_channels, "patch_size": patch_size}
        sizes["intermediate_size"] = self.shapes["encoder.layers.0.mlp.fc1.weight"][0]
        layers = overrides["num_hidden_layers"] - 1 if "num_hidden_layers" in overrides else self.layers
        # 2. A tile is `side` patches and a remainder that is cropped, and it divides the sides of all grids
        side = math.isqrt(self.shapes["embeddings.position_embedding.weight"][0])
        divisor, size = math.gcd(*(length for grid in grids for length in grid)), given.get("image_size")
        candidates = range(side * patch_size, (side + 1) * patch_size)
        fitting = [number for number in candidates if divisor % number == 0 and size in (None, number)]
        if not fitting:
            raise UserError(
                f"image_grid_pinpoints cannot be made of tiles of {size or 'any'} pixels with {side} x {side} patches "
                f"of {patch_size} pixels"
            )
        # 3. The heads
        if "num_attention_heads" not in given:
            raise UserError(
                f"the number of attention heads of the vision tower {self.title!r} is unknown: set it, for "
                "example with model.vision='{num_attention_heads: 16}' (src.export: vision=...)"
            )
        return {**sizes, **given, "num_hidden_layers": layers, "image_size": fitting[-1]}

    def missing_fields(self, tower: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `tower` that a reader could get neither from the tensors nor from this config."""
        return {key: value for key, value in tower.items() if key not in DERIVED and self.fields.get(key) != value}


def _layer(name: str) -> int:
    """Number of the layer that a tensor belongs to, -1 if it belongs to none."""
    match = re.match(r"encoder\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1
