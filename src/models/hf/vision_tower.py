"""The vision tower of an original folder. Its config.json names a tower, but says nothing about its sizes.

    tower = StoredTower(config, shapes, prefix)
    tower.describe({"num_attention_heads": 16}, grids)     fields of transformers' SiglipVisionConfig
    tower.unused()                                         names of tensors that the original never reads

Sizes come from the shapes of the tensors; the pixels of a tile from the tile grids; the number of heads, which no
tensor shows, from what is given, from a nested `vision_config`, or from the tower's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from src.io.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
KNOWN = {"so400m": {"num_attention_heads": 16, "num_hidden_layers": 27}}  # part of a tower's name -> what it means
SHOWN = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_channels", "patch_size", "image_size")
FIELDS = (*SHOWN, "num_attention_heads", "layer_norm_eps", "hidden_act", "attention_dropout")


class StoredTower:
    """Tensors called `prefix`... of a folder whose config.json names a tower.

    The original drops the last layer and the pooling head of a tower (`mm_vision_select_layer` -2). Released files are
    without them; where they are stored they are left out. In `vision_config`, and in what is given to `describe`,
    `num_hidden_layers` counts the last layer, as the tower's own config does.
    """

    def __init__(self, config: dict, shapes: Shapes, prefix: str) -> None:
        self.title = str(config.get("mm_vision_tower"))
        nested = {key: value for key, value in (config.get("vision_config") or {}).items() if key in FIELDS}
        self.fields: dict[str, Any] = {**_known(self.title), **nested}
        self.shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        self.prefix = prefix

    @property
    def layers(self) -> int:
        """How many layers are used."""
        if "num_hidden_layers" in self.fields:
            return self.fields["num_hidden_layers"] - 1
        stored = 1 + max((_layer(name) for name in self.shapes), default=-1)
        return stored - any(name.startswith("head.") for name in self.shapes)

    def unused(self) -> set[str]:
        """Names, as in the files, of the pooling head and of layers behind the last one used."""
        layers = self.layers
        return {self.prefix + name for name in self.shapes if name.startswith("head.") or _layer(name) >= layers}

    def describe(self, given: Mapping[str, Any], grids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """All fields of the tower. Raises UserError for what is unknown, and for what the tensors contradict."""
        if unknown := sorted(given.keys() - set(FIELDS)):
            raise UserError(f"vision has no field {unknown[0]!r}; there are {', '.join(FIELDS)}")
        fields = {**self.fields, **given}
        sizes = self._sizes()
        _agree(fields, {**sizes, "num_hidden_layers": sizes["num_hidden_layers"] + 1})
        side = math.isqrt(self.shapes["embeddings.position_embedding.weight"][0])
        image_size = _image_size(fields.get("image_size"), grids, side=side, patch=sizes["patch_size"])
        if "num_attention_heads" not in fields:
            raise UserError(
                f"nothing says how many attention heads the vision tower {self.title!r} has: give it, for "
                "example with model.vision='{num_attention_heads: 16}' (src.export: vision=...)"
            )
        return {**fields, **sizes, "image_size": image_size}

    def lacks(self, tower: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `tower` that neither the tensors nor this config would tell a reader."""
        return {key: value for key, value in tower.items() if key not in SHOWN and self.fields.get(key) != value}

    def _sizes(self) -> dict[str, int]:
        patch = self.shapes.get("embeddings.patch_embedding.weight", ())
        if len(patch) != 4:
            raise UserError(
                f"config.json names the vision tower {self.title!r}, but the weights hold none that fits "
                f"({self.prefix}embeddings.patch_embedding.weight must have 4 dimensions, it has {len(patch)})"
            )
        needed = ("embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
        if absent := [self.prefix + name for name in needed if name not in self.shapes]:
            raise UserError(f"the weights of the vision tower are incomplete: missing {', '.join(absent)}")
        return {
            "hidden_size": patch[0],
            "intermediate_size": self.shapes[needed[1]][0],
            "num_hidden_layers": self.layers,
            "num_channels": patch[1],
            "patch_size": patch[2],
        }


def _known(title: str) -> dict[str, int]:
    return next((fields for part, fields in KNOWN.items() if part in title.lower()), {})


def _layer(name: str) -> int:
    """Number of the layer that a tensor belongs to, -1 if to none."""
    found = re.match(r"encoder\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _agree(fields: Mapping[str, Any], stored: Mapping[str, int]) -> None:
    wrong = [f"{key} is {fields[key]}, but the weights have {value}" for key, value in stored.items()
             if fields.get(key, value) != value]  # fmt: skip
    if wrong:
        raise UserError(f"the vision tower: {'; '.join(wrong)} (num_hidden_layers counts the last layer, not stored)")


def _image_size(given: int | None, grids: Iterable[Sequence[int]], *, side: int, patch: int) -> int:
    """Pixels on a tile's side: that many patches and a rest which is cut off, and every grid is made of such tiles."""
    pixels = math.gcd(*(length for grid in grids for length in grid))
    fitting = [size for size in range(side * patch, (side + 1) * patch) if pixels % size == 0]
    fitting = [size for size in fitting if given in (None, size)]
    if not fitting:
        asked = "" if given is None else f" of {given} pixels"
        raise UserError(
            f"image_grid_pinpoints cannot be made of tiles{asked} with {side} x {side} patches of {patch} pixels"
        )
    return fitting[-1]
