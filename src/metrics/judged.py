"""Base of the metrics that a judge decides: a table of verdicts by image, and what is said when some are missing.

    metric = Clair(num_images=1000)
    metric.update({"missing": 0, "score": 0.85, "failed": 0}, row=17)      what `src.judges.clair.Clair.verdict` returns
    metric.compute()                 {"clair": {mean, se, n}, "clair_worst": ..., "clair_official": ..., ...}

Three values stand side by side: NAME leaves out what failed, NAME_worst counts it as wrong, NAME_official is what the
released scorer would print for these verdicts. NAME_failed is the share that failed, 0 to 1; more than `max_failed`
of it is an error, as any of the three could then be chosen for its value.

The state is the table itself, (images, columns), reduced over ranks by its maximum. So ranks may judge different
numbers of images, or none, and an image that a sampler pads or repeats counts once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from src.io.errors import UserError
from src.metrics.caption import Stat, divide, plain

MAX_FAILED = 0.01


class JudgedMetric(Metric):
    """A subclass lists the numbers of its verdict in `columns`, and defines `failed_share`, `parts` and `statistics`.

    num_images: of the benchmark; max_failed: share of failed and missing images, questions, ... that is no error
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True
    name: str
    columns: tuple[str, ...]
    table: Tensor

    def __init__(self, *, num_images: int, max_failed: float = MAX_FAILED) -> None:
        super().__init__()
        self.max_failed = max_failed
        unjudged = torch.full((num_images, len(self.columns) + 1), -math.inf, dtype=torch.float64)
        self.add_state("table", unjudged, dist_reduce_fx="max")

    def update(self, verdict: Mapping[str, float | None], row: int) -> None:
        """Add the verdict on the image of a row, counted from 0."""
        values = [verdict[name] for name in ("missing", *self.columns)]
        self.table[row] = self.table.new_tensor([math.nan if value is None else value for value in values])

    def column(self, name: str) -> Tensor:
        """(images,) float64"""
        return self.table[:, ("missing", *self.columns).index(name)]

    def failed_share(self) -> Tensor:
        """(images,) share of each image that has no usable verdict, 0 to 1; what is missing counts as 1 anyway."""
        raise NotImplementedError

    def parts(self) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of each image, (images,), 0 and 0 for one that is left out.

        The headline value is the ratio of their sums. Two systems are compared with them, image by image
        (`src.evaluation.statistics.compare`).
        """
        raise NotImplementedError

    def statistics(self) -> dict[str, Stat]:
        raise NotImplementedError

    def compute(self) -> dict[str, Stat]:
        """All statistics. Raises UserError if images have no verdict yet, or too much has failed."""
        if unjudged := int((self.column("missing") == -math.inf).sum()):
            raise UserError(f"{self.name}: {unjudged} of {len(self.table)} images are not judged yet; judge them first")
        missing = self.column("missing")
        failed = float(torch.where(missing == 1, 1.0, self.failed_share()).mean())
        if failed > self.max_failed:
            raise UserError(
                f"{self.name}: {failed:.1%} of the verdicts failed, {int(missing.sum())} captions of {len(self.table)} "
                f"are missing; judge again, or set evaluate.max_failed={math.ceil(failed * 100) / 100:g} and report it"
            )
        return {**self.statistics(), f"{self.name}_failed": plain(failed, len(self.table))}


def ratio(parts: tuple[Tensor, Tensor]) -> Stat:
    """sum(c) / sum(t) and its standard error, clustered by image; n counts the images with t > 0.

    se = sqrt(n / (n - 1) * sum((c - ratio * t)^2)) / sum(t), the linearised error of a ratio. If every t is 1 this is
    the sample standard deviation / sqrt(n). The binomial error is too small, as an image's claims share its caption.
    """
    c, t = (part[parts[1] > 0] for part in parts)
    value, n = divide(c.sum(), t.sum()), len(t)
    if n < 2:
        return plain(value, n)
    residual = (c - value * t).square().sum() * n / (n - 1)
    return Stat(mean=value, se=float(residual.sqrt() / t.sum()), n=n)
