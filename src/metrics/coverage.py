"""Coverage, the share of questions about the images that their captions answer. Verdicts: `src.judges.coverage`."""

from __future__ import annotations

from torch import Tensor

from src.metrics.caption import Stat, divide, plain
from src.metrics.judged import JudgedMetric, ratio


class Coverage(JudgedMetric):
    """`coverage`, over all questions; `coverage_worst` (what failed is wrong), `coverage_official`, `coverage_failed`.

    Besides `coverage_macro`, the mean over images, and `coverage_abstained`, the share of questions that the caption
    leaves open: an always guessing judge would have 0.
    """

    name = "coverage"
    columns = ("correct", "total", "abstained", "failed", "skipped")

    def failed_share(self) -> Tensor:
        return self.column("failed") / self.column("total")

    def parts(self) -> tuple[Tensor, Tensor]:
        return self.column("correct"), self.column("total") - self.column("failed")

    def statistics(self) -> dict[str, Stat]:
        correct, answered = self.parts()
        total, replied = self.column("total"), 1 - self.column("skipped")
        return {
            "coverage": ratio((correct, answered)),
            "coverage_worst": ratio((correct, total)),
            "coverage_official": plain(divide(correct.sum(), (total * replied).sum()), int(replied.sum())),
            "coverage_macro": ratio((correct / answered.clamp(min=1), (answered > 0).to(correct))),
            "coverage_abstained": ratio((self.column("abstained"), answered)),
        }
