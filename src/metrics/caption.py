"""Base of the caption metrics: scores of each caption, their mean over captions and its standard error.

    (texts, records) -> score(text, record) -> {name: value} per caption -> compute() -> {name: {mean, se, n}}

`record` is the sample's JSON from the shard (`captions`, `scene`). States are sums, so merging two halves of a test
set, or reducing over ranks, gives the result of a single pass.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torchmetrics import Metric


class Stat(TypedDict):
    """A mean, its standard error (None if undefined), and the number of values."""

    mean: float
    se: float | None
    n: int


class Mark(NamedTuple):
    """A flaw in the characters `start` to `end`: `false` (contradicts the image) or `ungrammatical`."""

    start: int
    end: int
    flaw: str


def summarise(values: Sequence[float]) -> Stat:
    """Mean and standard error of `values`. Raises ValueError if there are none."""
    numbers = torch.as_tensor(values, dtype=torch.float64)
    return stat_of(float(numbers.sum()), float(numbers.square().sum()), len(numbers))


def stat_of(total: float, squares: float, count: int) -> Stat:
    """Mean and standard error (sample standard deviation / sqrt(n)) from sum, sum of squares and count.

    Raises ValueError for a count of 0.
    """
    if count < 1:
        raise ValueError("no captions were scored")
    mean = total / count
    if count < 2:
        return Stat(mean=mean, se=None, n=count)
    variance = max(0.0, squares - count * mean * mean) / (count - 1)
    return Stat(mean=mean, se=math.sqrt(variance / count), n=count)


def ratio_stat(sums: list[float], count: int) -> Stat:
    """sum(s) / sum(n) and its linearised standard error, from the sums of s, n, s^2, sn, n^2 over `count` texts.

    Raises ValueError if sum(n) is 0.
    """
    s, n, ss, sn, nn = sums
    if not n:
        raise ValueError("no tokens were scored")
    ratio = s / n
    if count < 2:
        return Stat(mean=ratio, se=None, n=count)
    residual = max(0.0, ss - 2 * ratio * sn + ratio * ratio * nn) / (count - 1)
    return Stat(mean=ratio, se=math.sqrt(residual * count) / n, n=count)


def hash64(text: str) -> int:
    """A 64-bit hash, to count distinct texts: only tensors can be reduced over ranks."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class CaptionMetric(Metric):
    """Base of the caption metrics: a subclass lists its values in `names` and defines `score`.

    latest: the scores of each caption of the last `update`
    """

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
        self.latest: list[dict[str, float]] = []

    def score(self, text: str, record: dict) -> dict[str, float]:
        """The values of `names` for one caption."""
        raise NotImplementedError

    def check(self, record: dict) -> None:
        """Raise UserError for a record that cannot be scored; called for all records before the first caption."""
        self.score("", record)

    def marks(self, text: str, record: dict) -> list[Mark]:
        """Flaws of a caption, to highlight in pictures; most metrics report none."""
        return []

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        """Add captions, each with the record of its sample."""
        self.latest = [self.score(text, record) for text, record in zip(texts, records, strict=True)]
        for scores in self.latest:
            values = self.total.new_tensor([scores[name] for name in self.names])
            self.total += values
            self.squares += values.square()
            self.count += 1

    def compute(self) -> dict[str, Stat]:
        """Statistics by name."""
        count = int(self.count)
        sums = zip(self.names, self.total.tolist(), self.squares.tolist(), strict=True)
        return {name: stat_of(total, squares, count) for name, total, squares in sums}
