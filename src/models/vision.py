"""The vision path: SigLIP tower (transformers), two-layer projector and packing of tiles, as in LLaDA-V.

tiles (N, 3, S, S) uint8 of some images -> [-1, 1] -> tower -> last hidden states, no final norm (N, n, W)
  -> projector (N, n, D) -> tokens of each image. Square: the features of its one tile. AnyRes: those of the whole
  image, then those of the grid, joined, without the black bars, shrunk to the budget, a newline vector after each row

N tiles, n = side x side features of a tile, W width of the tower, D width of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from src.io.errors import UserError
from src.models.tiling import AnyRes, Layout, Size, Square


class VisionPath(nn.Module):
    """Image tokens for the decoder.

    tower: fields of `SiglipVisionConfig`; hidden_size: width of the decoder
    tiling: None means Square, one tile of the tower's `image_size`; another size raises UserError
    chunk: tiles in one forward call of the tower; changes memory, not the result

    NOTE: one FSDP2 unit, as ranks differ in the number of chunks, but not in the number of calls of `forward`.
    """

    def __init__(self, tower: dict, hidden_size: int, *, tiling: AnyRes | None = None, chunk: int = 32) -> None:
        super().__init__()
        self.config = SiglipVisionConfig(**{**tower, "vision_use_head": False})
        size, patch = self.config.image_size, self.config.patch_size
        assert isinstance(size, int)  # tiles are square
        assert isinstance(patch, int)
        if size < patch:
            raise UserError(f"image_size {size} is less than patch_size {patch}")
        self.layout: Layout = tiling or Square(size)
        if self.layout.size != size:
            raise UserError(f"the tower takes {size} pixels, but tiling.size is {self.layout.size}: make them equal")
        self.chunk, self.side = chunk, size // patch
        self.vision_tower = SiglipVisionModel(self.config)
        self.vision_tower.post_layernorm.requires_grad_(False)  # stored in the released weights, never applied
        width = self.config.hidden_size
        self.mm_projector = nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
        if tiling:
            self.image_newline = nn.Parameter(torch.randn(hidden_size) * hidden_size**-0.5)

    def checkpoint(self, on: bool) -> None:
        renamed = hasattr(self.vision_tower, "activation_checkpointing_enable")  # in transformers 5.23
        kind = "activation" if renamed else "gradient"
        if on:
            getattr(self.vision_tower, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(self.vision_tower, f"{kind}_checkpointing_disable")()

    def features(self, tiles: Tensor) -> Tensor:
        """Output of the last encoder layer (N, n, W), without the final norm that the tower's `forward` applies."""
        # (u8 / 255 - 0.5) / 0.5, in float32 before the cast; the loader's tiles have their channels last in memory
        pixels = tiles.to(torch.float32, memory_format=torch.contiguous_format).div(127.5).sub(1)
        embeddings = self.vision_tower.embeddings
        pixels = pixels.to(embeddings.patch_embedding.weight.dtype)
        return self.vision_tower.encoder(inputs_embeds=embeddings(pixels)).last_hidden_state

    def forward(self, tiles: Tensor, image_sizes: Sequence[Size]) -> list[Tensor]:
        """Tokens (., D) of each image. `tiles` (N, 3, S, S) uint8: those of the first image, then of the second, ..."""
        projected = torch.cat([self.mm_projector(self.features(part)) for part in tiles.split(self.chunk)])  # (N, n, D)
        parts = projected.split([self.layout.num_tiles(size) for size in image_sizes])
        return [self.pack(part, size) for part, size in zip(parts, image_sizes, strict=True)]

    def pack(self, features: Tensor, image_size: Size) -> Tensor:
        """Tokens (., D) of one image from the projected features of its tiles (T, n, D)."""
        if isinstance(self.layout, Square):
            return features[0]
        kept = self._grid(features[1:], self.layout, image_size)  # (H, W, D)
        newline = self.image_newline.expand(len(kept), 1, -1)
        return torch.cat([features[0], torch.cat([kept, newline], 1).flatten(0, 1)])

    def _grid(self, features: Tensor, layout: AnyRes, image_size: Size) -> Tensor:
        """(H, W, D): features (T - 1, n, D) of the grid's tiles, joined, without the black bars, and shrunk."""
        columns, rows = layout.grid(image_size)
        tiled = features.unflatten(0, (rows, columns)).unflatten(2, (self.side, self.side))
        whole = tiled.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows * side, columns * side, D)
        kept = whole[layout.unpadded(image_size, side=self.side)]
        final = layout.final(image_size, side=self.side)
        if final == kept.shape[:2]:
            return kept
        return F.interpolate(kept.permute(2, 0, 1)[None], final, mode="bilinear")[0].permute(1, 2, 0)
