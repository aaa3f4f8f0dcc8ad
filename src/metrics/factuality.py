"""Factuality, the share of the captions' claims that are true of their images. Verdicts: `src.judges.factuality`.

It rises when text collapses, as fewer claims are left to be wrong: read it with `factuality_claims` and Coverage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from src.metrics.caption import Stat, divide, plain
from src.metrics.judged import JudgedMetric, ratio


class Factuality(JudgedMetric):
    """`factuality`, over all claims; `factuality_worst`, `factuality_official`, `factuality_failed`.

    `factuality_worst` counts a claim without a verdict as false, and a caption that was not taken apart as if it had as
    many claims as the others have on average, all false. Besides `factuality_macro`, the mean over images, and per
    image `factuality_claims` and `factuality_skipped`.
    """

    name = "factuality"
    columns = ("true", "total", "failed", "skipped")

    def failed_share(self) -> Tensor:
        share = self.column("failed") / self.column("total").clamp(min=1)
        return torch.where(self.column("skipped") == 1, 1.0, share)

    def parts(self) -> tuple[Tensor, Tensor]:
        return self.column("true"), self.column("total") - self.column("failed")

    def statistics(self) -> dict[str, Stat]:
        true, judged = self.parts()
        total, skipped = self.column("total"), self.column("skipped")
        imputed = torch.where(skipped == 1, divide(total.sum(), (1 - skipped).sum()), total)
        return {
            "factuality": ratio((true, judged)),
            "factuality_worst": ratio((true, imputed)),
            "factuality_official": plain(divide(true.sum(), total.sum()), int((1 - skipped).sum())),
            "factuality_macro": ratio((true / judged.clamp(min=1), (judged > 0).to(true))),
            "factuality_claims": ratio((total, 1 - skipped)),
            "factuality_skipped": ratio((skipped, torch.ones_like(skipped))),
        }
