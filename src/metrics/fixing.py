"""What one look of a model does to drafts that an expert has corrected.

P(fix)     share of the wrong tokens that it turns right        P(break)   share of the right tokens that it changes
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
    """(4,) float64: wrong tokens turned right, wrong tokens, right tokens changed, right tokens.

    batches: of corrected drafts; `flawed` is the draft, `response` the corrected one. A right token is one of the text
    or its end, none of the `filler` behind it.
    """
    counts = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        seen = backbone(backbone.encode_prefix(batch.prefix), batch.flawed).argmax(-1)  # (B, L)
        wrong = batch.flawed != batch.response
        right = batch.editable & ~wrong & (batch.response != filler)
        for place, (hit, tried) in enumerate(((seen == batch.response, wrong), (seen != batch.flawed, right))):
            counts[2 * place] += (hit & tried).sum()
            counts[2 * place + 1] += tried.sum()
    return counts
