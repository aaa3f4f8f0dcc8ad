"""What all caption metrics share: a score for each caption, the mean over captions and its standard error.

    (texts, records) -> score(text, record) -> {name: value} per caption -> compute() -> {name: {mean, se, n}}

`record` is the shard's JSON of the sample (`captions`, `scene`). States are sums, so two halves of a test set
that are merged, or two ranks that are reduced, give what one pass would have given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torchmetrics import Metric


class Stat(TypedDict):
    """A mean, its standard error (None where it is not defined), and the number of values behind it."""

    mean: float
    se: float | None
    n: int


class Mark(NamedTuple):
    """A flaw at the characters `start` to `end`: `false` (contradicts the image) or `ungrammatical`."""

    start: int
    end: int
    flaw: str


def summarise(values: Sequence[float]) -> Stat:
    """Mean and standard error of some values."""
    numbers = torch.as_tensor(values, dtype=torch.float64)
    return stat_of(float(numbers.sum()), float(numbers.square().sum()), len(numbers))


def stat_of(total: float, squares: float, count: int) -> Stat:
    """Mean and standard error (sample deviation over the root of n) from sum, sum of squares and count."""
    if count < 1:
        raise ValueError("no captions were scored")
    mean = total / count
    if count < 2:
        return Stat(mean=mean, se=None, n=count)
    variance = max(0.0, squares - count * mean * mean) / (count - 1)
    return Stat(mean=mean, se=math.sqrt(variance / count), n=count)


class CaptionMetric(Metric):
    """Base of the metrics: a subclass names its values in `names` and defines `score`."""

    is_differentiable = False
    full_state_update = False
    names: tuple[str, ...]
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(self.names), dtype=torch.float64)
        self.add_state("total", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("squares", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def score(self, text: str, record: dict) -> dict[str, float]:
        """The values of `names` for one caption."""
        raise NotImplementedError

    def marks(self, text: str, record: dict) -> list[Mark]:
        """Flawed places of a caption, for pictures; most metrics know none."""
        return []

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        """Add captions and the records of the samples that they describe."""
        for text, record in zip(texts, records, strict=True):
            found = self.score(text, record)
            values = self.total.new_tensor([found[name] for name in self.names])
            self.total += values
            self.squares += values.square()
            self.count += 1

    def compute(self) -> dict[str, Stat]:
        """Statistics by name."""
        count = int(self.count)
        sums = zip(self.names, self.total.tolist(), self.squares.tolist(), strict=True)
        return {name: stat_of(total, squares, count) for name, total, squares in sums}
