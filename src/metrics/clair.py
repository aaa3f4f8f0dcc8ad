"""CLAIR, the mean score of the captions, 0 to 1. Verdicts: `src.judges.clair`."""

from __future__ import annotations

from torch import Tensor

from src.metrics.caption import Stat, divide, plain
from src.metrics.judged import JudgedMetric, ratio


class Clair(JudgedMetric):
    """`clair`, `clair_worst` (what failed scores 0), `clair_official`, `clair_failed`."""

    name = "clair"
    columns = ("score", "failed")

    def failed_share(self) -> Tensor:
        return self.column("failed")

    def parts(self) -> tuple[Tensor, Tensor]:
        scored = 1 - self.column("failed") - self.column("missing")
        return self.column("score") * scored, scored

    def statistics(self) -> dict[str, Stat]:
        scores, scored = self.parts()
        # the released scorer adds a score whose reason is null, but leaves its image out of the number of images
        official = divide(self.column("score").sum(), scored.sum())
        return {
            "clair": ratio((scores, scored)),
            "clair_worst": ratio((scores, scored.new_ones(len(scored)))),
            "clair_official": plain(official, int(scored.sum())),
        }
