"""LLaDA-V: vision path and LLaDA decoder as one backbone. The tiny model is this class with small sizes.

encode_prefix({prompt_ids, prompt_mask?, pixel_values?, num_tiles?, image_sizes?}) -> Prefix, images at their marks
forward(prefix, tokens (B, L), attend, positions) -> logits, only at `positions`

prompt_ids   (B, T) int64, any number of image marks in a row; prompt_mask (B, T) bool where rows are padded
pixel_values (B, N, 3, S, S) uint8: the tiles of a row's images one after another, then padding
num_tiles    (B, M) int64: tiles of each image, 0 where a row has fewer than M images
image_sizes  (B, M, 2) int64: (width, height) of each image before it was cut into tiles
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from src.io.errors import UserError
from src.models.llada import CHECKPOINTING, Decoder, DecoderConfig
from src.models.lora import apart
from src.models.tiling import AnyRes, Layout, Size
from src.models.vision import VisionPath
from src.types import Positions, Prefix


class LLaDAV(nn.Module):
    """Backbone (see `src.types.Backbone`).

    decoder: fields of `DecoderConfig`; vision: of transformers' `SiglipVisionConfig`, None for text only
    image_id: marks the places of images in `prompt_ids`
    tiling: arguments of `src.models.tiling.AnyRes`; None means one square tile an image

    Raises UserError for sizes that contradict each other, and for a batch with images that do not fit the model:
    without a vision path, another number of images than image marks in a row, other tiles than the layout makes.
    """

    def __init__(
        self,
        *,
        decoder: dict,
        vision: dict | None,
        image_id: int = -200,
        tiling: dict | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if tiling and not vision:
            raise UserError("tiling is set, but the model has no vision path (vision is null)")
        self.config = DecoderConfig(**decoder)
        self.vision_config, self.tiling = vision, tiling
        self.original: dict = {}  # further fields of an original config.json, for an export in its layout
        self.image_id = image_id
        self.response_length: int | None = None  # that the model was trained with
        self.lora: dict | None = None  # of a model with adapters, see `src.models.lora`
        self.model = Decoder(self.config)
        layout = AnyRes(**tiling) if tiling else None
        self.vision = VisionPath(vision, self.config.hidden_size, tiling=layout) if vision else None
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        for part in (self.model, self.lm_head, self.vision and self.vision.mm_projector):
            if part is not None:
                part.apply(partial(_init, std=init_std))

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def layout(self) -> Layout | None:
        """How images must be cut into tiles; None for a model without images."""
        return self.vision.layout if self.vision else None

    def units(self) -> Iterator[tuple[nn.Module | list[nn.Module], tuple[str, ...]]]:
        """The units of FSDP2, inner ones first, each with its entry points besides `forward`."""
        if self.vision:
            yield self.vision, ()
        yield self.model.embed_tokens, ()
        for block in self.model.layers:
            yield from ((adapter, ()) for adapter in apart(block))
            yield block, ("keys_values",)
        yield self.lm_head, ()
        yield self, ("encode_prefix",)

    def checkpoint(self, mode: str) -> None:
        """Set activation checkpointing (see `Decoder._run`). The vision tower uses `full` for `selective` too."""
        if mode not in CHECKPOINTING:
            raise UserError(f"checkpointing must be one of {CHECKPOINTING}, got {mode!r}")
        self.model.checkpointing = mode
        if self.vision:
            self.vision.checkpoint(mode != "none")

    def compile_blocks(self) -> None:
        """Compile each decoder block, once; parameter names and hooks stay as they are."""
        for block in self.model.layers:
            if "forward" not in vars(block):
                block.forward = torch.compile(block.forward)

    def encode_prefix(self, prefix: dict[str, Tensor]) -> Prefix:
        """Embed the prompt, insert the image tokens and, in `prefix` mode, run the decoder over it once."""
        ids, mask = prefix["prompt_ids"], prefix.get("prompt_mask")
        # 1. The host learns where images go and how large they are: it waits for the device here, and only here.
        parts = [ids, torch.ones_like(ids) if mask is None else mask.long()]
        parts += [prefix[name] for name in ("num_tiles", "image_sizes") if "pixel_values" in prefix]
        host = torch.cat([part.flatten() for part in parts]).cpu().split([part.numel() for part in parts])
        values = [part.numpy().reshape(shape) for part, shape in zip(host, (part.shape for part in parts), strict=True)]
        keep = values[1] > 0  # (B, T)
        marks = keep & (values[0] == self.image_id)
        sizes = self._image_sizes(prefix["pixel_values"], *values[2:]) if len(values) > 2 else [[] for _ in ids]
        for row, (num_marks, images) in enumerate(zip(marks.sum(1).tolist(), sizes, strict=True)):
            if num_marks != len(images):
                message = f"the prompt holds {num_marks} image marks, but there are {len(images)} images"
                raise UserError(f"row {row}: {message}")
        # 2. The images, and their tokens between those of the text.
        if self.vision and any(sizes):
            pixels = prefix["pixel_values"].flatten(0, 1)
            real = np.arange(prefix["pixel_values"].shape[1]) < values[2].sum(1, keepdims=True)  # (B, N)
            tiles = pixels if real.all() else pixels[_places(real, pixels.device)]
            images = self.vision(tiles, [size for row in sizes for size in row])
            embeds, mask = self._splice(ids, keep, marks, images)
        else:
            embeds = self.model.embed_tokens(ids)
        if self.config.attention == "full":
            return Prefix(embeds, mask)
        return Prefix(embeds, mask, *self.model.prefix_cache(embeds, mask))

    def forward(
        self, prefix: Prefix, tokens: Tensor, *, attend: Tensor | None = None, positions: Positions | None = None
    ) -> Tensor:
        """Logits (B, L, V), or (N, V) at `positions`; those of a mask in row-major order."""
        hidden = self.model(self.model.embed_tokens(tokens), prefix, attend)
        return self.lm_head(hidden if positions is None else hidden[positions])

    def _image_sizes(self, pixels: Tensor, num_tiles: np.ndarray, image_sizes: np.ndarray) -> list[list[Size]]:
        """(width, height) of the images of each row."""
        if self.layout is None:
            raise UserError("the batch has images, but the model has no vision path (model.vision is null)")
        assert pixels.dtype == torch.uint8, "other pixels would be scaled wrongly"
        sizes_by_row = []
        for row, (counts, sizes) in enumerate(zip(num_tiles.tolist(), image_sizes.tolist(), strict=True)):
            sizes_of_row = []
            for count, (width, height) in zip(counts, sizes, strict=True):
                if not count:
                    continue  # padding
                sizes_of_row.append((width, height))
                expected = self.layout.num_tiles((width, height))
                if count != expected:
                    raise UserError(
                        f"row {row}: an image of {width} x {height} pixels comes as {count} tiles, "
                        f"but the model makes {expected} of it (see data.tiling)"
                    )
            sizes_by_row.append(sizes_of_row)
        return sizes_by_row

    def _splice(
        self, ids: Tensor, keep: np.ndarray, marks: np.ndarray, images: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, P, D) of the prompt with the tokens of `images` at the `marks` (B, T), in order; mask (B, P).

        keep (B, T): where the prompt is not padding. Shorter rows end in zero vectors, which the mask excludes; it is
        None if all rows are equally long.
        """
        width = keep.astype(np.int64)  # (B, T): number of positions that each id of the prompt takes
        width[marks] = [len(tokens) for tokens in images]
        length = width.sum(1, keepdims=True)  # (B, 1)
        mask = np.arange(length.max()) < length  # (B, P)
        of_image = np.zeros_like(mask)
        of_image[mask] = np.repeat(marks.ravel(), width.ravel())
        text = self.model.embed_tokens(ids.flatten()[_places(keep & ~marks, ids.device)])
        embeds = text.new_zeros(mask.size, text.shape[-1])
        embeds.index_copy_(0, _places(of_image, ids.device), torch.cat(images).to(text.dtype))
        embeds.index_copy_(0, _places(mask & ~of_image, ids.device), text)
        device_mask = None if mask.all() else torch.from_numpy(mask).to(ids.device, non_blocking=True)
        return embeds.view(*mask.shape, -1), device_mask


def _places(mask: np.ndarray, device: torch.device) -> Tensor:
    """(N,) int64: the true positions of the flattened mask, on the device."""
    return torch.from_numpy(np.flatnonzero(mask)).to(device, non_blocking=True)


def _init(module: nn.Module, *, std: float) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
