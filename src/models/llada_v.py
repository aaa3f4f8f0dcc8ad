"""LLaDA-V: image path and LLaDA decoder as one backbone. The tiny model is this class with small numbers.

encode_prefix({prompt_ids (B, T), pixel_values (B, 3, S, S), prompt_mask}) -> Prefix, image tokens at the image id
forward(prefix, tokens (B, L), attend, positions) -> logits only where asked
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from src.batch import Prefix
from src.models.llada import Decoder, DecoderConfig
from src.models.vision import VisionPath


class LLaDAV(nn.Module):
    """Backbone (see `src.batch.Backbone`). `image_id` marks the place of the image in `prompt_ids`.

    Raises ValueError when a row of `prompt_ids` does not hold exactly one image mark although images are given.
    """

    def __init__(self, *, decoder: dict, vision: dict | None, image_id: int = -200, init_std: float = 0.02) -> None:
        super().__init__()
        self.config = DecoderConfig(**decoder)
        self.vision_config = vision
        self.image_id = image_id
        self.model = Decoder(self.config)
        self.vision = VisionPath(vision, self.config.hidden_size) if vision else None
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        for part in (self.model, self.lm_head, self.vision and self.vision.mm_projector):
            if part is not None:
                part.apply(partial(_init, std=init_std))

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def encode_prefix(self, prefix: dict[str, Tensor]) -> Prefix:
        """Embed the prompt, put the image tokens in place, and in `prefix` mode run the decoder over it once."""
        ids, mask = prefix["prompt_ids"], prefix.get("prompt_mask")
        if "pixel_values" in prefix:
            embeds, mask = self._splice(ids, mask, prefix["pixel_values"])
        else:
            embeds = self.model.embed_tokens(ids)
        cache = self.model.prefix_cache(embeds, mask) if self.config.attention == "prefix" else None
        return Prefix(embeds, mask, cache)

    def forward(
        self, prefix: Prefix, tokens: Tensor, *, attend: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits (B, L, V), or (N, V) at the true places of `positions` (B, L) bool, in row-major order."""
        hidden = self.model(self.model.embed_tokens(tokens), prefix.embeds, prefix.mask, prefix.cache, attend)
        return self.lm_head(hidden if positions is None else hidden[positions])

    def _splice(self, ids: Tensor, mask: Tensor | None, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.vision is None:
            raise ValueError("the batch has images, but the model has no vision path (model.vision is null)")
        where = ids == self.image_id
        if not bool((where.sum(1) == 1).all()):
            raise ValueError("every prompt must hold exactly one image mark")
        image = self.vision(pixel_values)  # (B, N, D)
        text = self.model.embed_tokens(ids.masked_fill(where, 0))  # (B, T, D)
        batch, count, width = image.shape
        keep = torch.cat([torch.zeros(batch, count, dtype=torch.bool, device=ids.device), ~where], 1)
        start = where.int().argmax(1, keepdim=True)  # (B, 1)
        place = torch.arange(ids.shape[1], device=ids.device)[None]
        target = torch.cat(
            [
                start + torch.arange(count, device=ids.device)[None],
                torch.where(place > start, place + count - 1, place),
            ],
            1,
        )  # where each image token, then each text token goes; the image mark itself is overwritten by the image
        length = ids.shape[1] + count - 1
        source = torch.cat([image, text], 1)
        keep[:, :count] = True
        rows = torch.arange(batch, device=ids.device)[:, None].expand_as(target)
        embeds = source.new_zeros(batch, length, width)
        embeds = embeds.index_put((rows[keep], target[keep]), source[keep])
        if mask is not None:
            wide = torch.cat([mask.new_ones(batch, count), mask], 1)
            mask = mask.new_zeros(batch, length).index_put((rows[keep], target[keep]), wide[keep])
        return embeds, mask


def _init(module: nn.Module, *, std: float) -> None:
    """Normal weights, zero biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
