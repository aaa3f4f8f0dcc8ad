"""What one forward call changes in drafts that an expert has corrected: P(fix), the share of the wrong tokens that it
corrects, and P(break), the share of the right tokens that it changes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from src.types import Backbone, Batch


@torch.no_grad()
def count_fixes(
    backbone: Backbone, batches: Iterable[Batch], *, filler: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Counts (4,) float64: corrected wrong tokens, wrong tokens, changed right tokens, right tokens.

    batches: corrected drafts, in which `flawed` is the draft and `response` its correction
    filler: id that fills the response length after the end of the text; it does not count as a right token
    """
    counts = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        predicted = backbone(backbone.encode_prefix(batch.prefix), batch.flawed).argmax(-1)  # (B, L)
        wrong = batch.flawed != batch.response
        right = batch.editable & ~wrong & (batch.response != filler)
        fixed, broken = wrong & (predicted == batch.response), right & (predicted != batch.flawed)
        counts += torch.stack([mask.sum() for mask in (fixed, wrong, broken, right)])
    return counts
