"""Precision, recall and F1 of facts that a reader found in texts. Verdicts: `src.judges.rubric`."""

from __future__ import annotations

from torch import Tensor

from src.metrics.caption import Stat
from src.metrics.judged import JudgedMetric, ratio

KINDS = ("object", "attribute", "relation")


class Rubric(JudgedMetric):
    """`rubric`, the mean over images of F1 of all facts; `rubric_worst` (what failed is a no), `rubric_failed`.

    Besides `rubric_precision` and `rubric_recall`, means over images, and `rubric_recall_KIND`, over all facts of a
    kind. There is no released scorer, so no `rubric_official`.
    """

    name = "rubric"
    columns = tuple(
        f"{side}_{kind}_{what}"
        for side in ("recall", "precision")
        for kind in KINDS
        for what in ("yes", "facts", "failed")
    )

    def sums(self, side: str, what: str) -> Tensor:
        """(images,) over all kinds"""
        return self.column(f"{side}_object_{what}") + sum(self.column(f"{side}_{kind}_{what}") for kind in KINDS[1:])

    def share(self, side: str, *, worst: bool = False) -> Tensor:
        """(images,) share of the facts that are stated; 0 where there are none. worst: failed ones count as no"""
        facts = self.sums(side, "facts") - (0 if worst else self.sums(side, "failed"))
        return self.sums(side, "yes") / facts.clamp(min=1)

    def failed_share(self) -> Tensor:
        facts = self.sums("recall", "facts") + self.sums("precision", "facts")
        return (self.sums("recall", "failed") + self.sums("precision", "failed")) / facts.clamp(min=1)

    def parts(self) -> tuple[Tensor, Tensor]:
        present = 1 - self.column("missing")
        return f1(self.share("precision"), self.share("recall")) * present, present

    def statistics(self) -> dict[str, Stat]:
        scores, present = self.parts()
        worst = f1(self.share("precision", worst=True), self.share("recall", worst=True))
        stats = {"rubric": ratio((scores, present)), "rubric_worst": ratio((worst, present.new_ones(len(present))))}
        for side in ("precision", "recall"):
            stats[f"rubric_{side}"] = ratio((self.share(side) * present, present))
        for kind in KINDS:
            facts = self.column(f"recall_{kind}_facts") - self.column(f"recall_{kind}_failed")
            stats[f"rubric_recall_{kind}"] = ratio((self.column(f"recall_{kind}_yes"), facts))
        return stats


def f1(precision: Tensor, recall: Tensor) -> Tensor:
    total = precision + recall
    return 2 * precision * recall / total.where(total > 0, total.new_ones(()))
