"""The image path: SigLIP tower (transformers) and two-layer projector, as in LLaDA-V.

pixel_values (B, 3, S, S) in [-1, 1] -> tower -> last hidden states, no final norm (B, N, W) -> projector (B, N, D)
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel


class VisionPath(nn.Module):
    """Image tokens for the decoder. `tower`: fields of `SiglipVisionConfig`; `hidden_size`: width of the decoder."""

    def __init__(self, tower: dict, hidden_size: int) -> None:
        super().__init__()
        self.config = SiglipVisionConfig(**{**tower, "vision_use_head": False})
        self.vision_tower = SiglipVisionModel(self.config)
        self.vision_tower.post_layernorm.requires_grad_(False)  # stored by the original, never applied
        width = self.config.hidden_size
        self.mm_projector = nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def features(self, pixel_values: Tensor) -> Tensor:
        """Output of the last encoder layer (B, N, W); `last_hidden_state` would be behind the unused final norm."""
        return self.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1]

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.mm_projector(self.features(pixel_values))
