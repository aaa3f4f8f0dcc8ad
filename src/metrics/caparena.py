"""CapArena-Auto: wins minus losses against the captions of three models, -100 to 100. Verdicts: `src.judges.caparena`.

A battle that is judged in both orders counts as the mean of its two outcomes, so that a judge who always prefers the
first caption calls a tie. It has failed if a reply of either order could not be read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from src.metrics.caption import Stat, divide, plain
from src.metrics.judged import MAX_FAILED, JudgedMetric, ratio

BASELINES = ("GPT-4o-0806", "CogVLM2-llama3-chat-19B", "MiniCPM-V2.6-8B")
BATTLES = 200  # per baseline, whatever their real number: the released scorer's fixed denominator


class CapArenaScore(JudgedMetric):
    """`caparena`, over all battles; `caparena_worst` (a failed order is lost), `caparena_official`, `caparena_failed`.

    `caparena_official` is the mean over `baselines` of (wins - losses) / 2, where what failed is a tie;
    `caparena_BASELINE` is one of them. Besides `caparena_words` per caption, `caparena_first_slot`, the share of
    decided replies that prefer the first caption, and `caparena_consistency`, the share of battles whose orders agree.
    """

    name = "caparena"
    columns = ("baseline", "as_first", "as_second", "orders", "words")

    def __init__(
        self, *, num_images: int, max_failed: float = MAX_FAILED, baselines: Sequence[str] = BASELINES
    ) -> None:
        super().__init__(num_images=num_images, max_failed=max_failed)
        self.baselines = tuple(baselines)

    def outcomes(self) -> Tensor:
        """(images,) mean outcome of each battle for the caption under test, -1 to 1; NaN if it has failed."""
        orders = self._orders()
        read = (~orders.isnan()).sum(1)
        return torch.where((read == self.column("orders")) & (read > 0), orders.nanmean(1), math.nan)

    def failed_share(self) -> Tensor:
        return self.outcomes().isnan().double()

    def parts(self) -> tuple[Tensor, Tensor]:
        outcomes = self.outcomes()
        return 100 * outcomes.nan_to_num(0), (~outcomes.isnan()).double()

    def statistics(self) -> dict[str, Stat]:
        outcomes, orders, shown = self.outcomes(), self._orders(), self.column("orders")
        present = self.column("missing") == 0
        # failed orders, and captions that are missing, as losses
        lost = shown - (~orders.isnan()).sum(1)
        worst = torch.where(present, (orders.nansum(1) - lost) / shown, -1.0)
        columns = {}
        for number, baseline in enumerate(self.baselines):
            mean = (orders.nansum(1) / shown)[present & (self.column("baseline") == number)]
            columns[f"caparena_{baseline}"] = plain(100 * float(mean.sum()) / BATTLES, len(mean))
        official = sum(column["mean"] for column in columns.values()) / len(columns)
        both = orders[~orders.isnan().any(1)]
        firsts, seconds = (int((orders * orders.new_tensor([1, -1]) == sign).sum()) for sign in (1, -1))
        return {
            "caparena": signed(outcomes[~outcomes.isnan()]),
            "caparena_worst": signed(worst),
            "caparena_official": plain(official, int(present.sum())),
            **columns,
            "caparena_words": ratio((self.column("words"), present.double())),
            "caparena_first_slot": plain(divide(firsts, firsts + seconds), firsts + seconds),
            "caparena_consistency": plain(divide((both[:, 0] == both[:, 1]).sum(), len(both)), len(both)),
        }

    def _orders(self) -> Tensor:
        """(images, 2): outcome with the caption under test first, and second."""
        return torch.stack([self.column("as_first"), self.column("as_second")], 1)


def signed(outcomes: Tensor) -> Stat:
    """100 * mean of outcomes (n,) from -1 to 1, and its standard error 100 * sqrt((mean x^2 - (mean x)^2) / n)."""
    n, mean = len(outcomes), divide(outcomes.sum(), len(outcomes))
    if not n:
        return plain(mean, n)
    return Stat(mean=100 * mean, se=100 * math.sqrt(float((outcomes - mean).square().mean()) / n), n=n)
