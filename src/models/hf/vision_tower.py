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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from src.io.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
KNOWN = {"so400m": {"num_attention_heads": 16, "num_hidden_layers": 27}}  # part of a tower's name -> its fields
DERIVED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_channels", "patch_size", "image_size")
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
        """All fields of the tower. Raises UserError for unknown fields, and for values that the tensors contradict."""
        if unknown := sorted(overrides.keys() - set(FIELDS)):
            raise UserError(f"vision has no field {unknown[0]!r}; its fields are {', '.join(FIELDS)}")
        fields = {**self.fields, **overrides}
        sizes = self._sizes()
        _check_agreement(fields, {**sizes, "num_hidden_layers": sizes["num_hidden_layers"] + 1})
        side = math.isqrt(self.shapes["embeddings.position_embedding.weight"][0])
        image_size = _image_size(fields.get("image_size"), grids, side=side, patch=sizes["patch_size"])
        if "num_attention_heads" not in fields:
            raise UserError(
                f"the number of attention heads of the vision tower {self.title!r} is unknown: set it, for "
                "example with model.vision='{num_attention_heads: 16}' (src.export: vision=...)"
            )
        return {**fields, **sizes, "image_size": image_size}

    def missing_fields(self, tower: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `tower` that a reader could get neither from the tensors nor from this config."""
        return {key: value for key, value in tower.items() if key not in DERIVED and self.fields.get(key) != value}

    def _sizes(self) -> dict[str, int]:
        patch = self.shapes.get("embeddings.patch_embedding.weight", ())
        if len(patch) != 4:
            raise UserError(
                f"config.json names the vision tower {self.title!r}, but the weights contain no matching one "
                f"({self.prefix}embeddings.patch_embedding.weight must have 4 dimensions, it has {len(patch)})"
            )
        needed = ("embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
        if missing := [self.prefix + name for name in needed if name not in self.shapes]:
            raise UserError(f"the weights of the vision tower are incomplete: missing {', '.join(missing)}")
        return {
            "hidden_size": patch[0],
            "intermediate_size": self.shapes[needed[1]][0],
            "num_hidden_layers": self.layers,
            "num_channels": patch[1],
            "patch_size": patch[2],
        }


def _layer(name: str) -> int:
    """Number of the layer that a tensor belongs to, -1 if it belongs to none."""
    match = re.match(r"encoder\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _check_agreement(fields: Mapping[str, Any], stored: Mapping[str, int]) -> None:
    conflicts = [
        f"{key} is {fields[key]}, but the weights have {value}"
        for key, value in stored.items()
        if fields.get(key, value) != value
    ]
    if conflicts:
        raise UserError(
            f"the vision tower: {'; '.join(conflicts)} (num_hidden_layers includes the last layer, which is not stored)"
        )


def _image_size(size: int | None, grids: Iterable[Sequence[int]], *, side: int, patch: int) -> int:
    """Side of a tile in pixels: `side` patches and a remainder that is cropped, and it divides the sides of all grids.

    size: the only size allowed, None for any
    """
    divisor = math.gcd(*(length for grid in grids for length in grid))
    sizes = [n for n in range(side * patch, (side + 1) * patch) if divisor % n == 0 and size in (None, n)]
    if not sizes:
        tiles = "tiles" if size is None else f"tiles of {size} pixels"
        raise UserError(
            f"image_grid_pinpoints cannot be made of {tiles} with {side} x {side} patches of {patch} pixels"
        )
    return sizes[-1]
