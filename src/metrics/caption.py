"""Base of the caption metrics: scores of each caption, their mean over captions and its standard error.

    (texts, records) -> score(text, record) -> {name: value} per caption -> compute() -> {name: {mean, se, n}}

`record` is the sample's JSON from the shard (`key`, `captions`, `scene`). The state is the values of each caption with
a hash of its key. So ranks may score different numbers of captions, or none, and a caption that a sampler pads or
repeats counts once. What a subclass adds (corpus n-grams, sums of facts) are sums, in which a repeat counts twice.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torchmetrics import Metric

Ngram = tuple[str, ...]


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
    """Mean and standard error (sample standard deviation / sqrt(n)). Raises ValueError if there are no values."""
    numbers = torch.as_tensor(values, dtype=torch.float64)
    return stat_of(float(numbers.sum()), float(numbers.square().sum()), len(numbers))


def stat_of(total: float, squares: float, count: int) -> Stat:
    """`summarise` from the sum, the sum of squares and the number of the values."""
    if count < 1:
        raise ValueError("no captions were scored")
    mean = total / count
    if count < 2:
        return Stat(mean=mean, se=None, n=count)
    variance = max(0.0, squares - count * mean * mean) / (count - 1)
    return Stat(mean=mean, se=math.sqrt(variance / count), n=count)


def plain(value: float, count: int) -> Stat:
    """A statistic without a standard error."""
    return Stat(mean=value, se=None, n=count)


def divide(total: Tensor | float, count: Tensor | float) -> float:
    """NaN for nothing, where a released scorer ends in a ZeroDivisionError."""
    return float(total) / float(count) if count else math.nan


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


class CaptionMetric(Metric):
    """A subclass lists its values in `names` and defines `score`. `latest`: the scores of the last `update`.

    breakdown: metrics of `compute` that get a table of their own in reports
    headline: those of `names` that benchmarks keep for each image; (): the first
    """

    is_differentiable = False
    full_state_update = False
    names: tuple[str, ...]
    breakdown: tuple[str, ...] = ()
    headline: tuple[str, ...] = ()
    rows: Any  # list of Tensors, or a Tensor once reduced over ranks

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.reset()
        self.latest: list[dict[str, float]] = []

    def reset(self) -> None:
        super().reset()
        # a rank without captions would otherwise offer float32 to the others
        self.rows = [torch.empty(0, 1 + len(self.names), dtype=torch.float64, device=self.device)]

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
        self.accumulate(records)

    def accumulate(self, records: Sequence[dict]) -> None:
        """Add `latest`, the values of `names` of each caption."""
        rows = [
            [hash53(str(record["key"])) if "key" in record else math.nan, *(scores[name] for name in self.names)]
            for record, scores in zip(records, self.latest, strict=True)
        ]
        self.rows.append(torch.tensor(rows, dtype=torch.float64, device=self.device).view(-1, 1 + len(self.names)))

    def columns(self) -> dict[str, list[float]]:
        """The values of all captions by name, each key once; captions without a key all count."""
        rows: dict[float, list[float]] = {}
        for number, (key, *row) in enumerate(concatenated(self.rows).tolist()):
            rows.setdefault(-1 - number if math.isnan(key) else key, row)
        return {name: [row[n] for row in rows.values()] for n, name in enumerate(self.names)}

    def compute(self) -> dict[str, Stat]:
        return {name: summarise(values) for name, values in self.columns().items()}


class NgramMetric(CaptionMetric):
    """Base of metrics that also give, without an error, the distinct n-grams of the whole set divided by all n-grams.

    distinct: names of these shares, the keys of what a subclass's `ngrams` returns
    """

    def __init__(self, *, distinct: Sequence[str]) -> None:
        super().__init__()
        self.distinct = tuple(distinct)
        for name in self.distinct:
            self.add_state(name, [], dist_reduce_fx="cat")

    def ngrams(self, text: str) -> dict[str, list[Ngram]]:
        raise NotImplementedError

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        super().update(texts, records)
        for text in texts:
            for name, ngrams in self.ngrams(text).items():
                hashes = [hash64("\n".join(ngram)) for ngram in ngrams]
                getattr(self, name).append(torch.tensor(hashes, dtype=torch.int64, device=self.device))

    def compute(self) -> dict[str, Stat]:
        stats = super().compute()
        for name in self.distinct:
            hashes = concatenated(getattr(self, name))
            share = len(hashes.unique()) / len(hashes) if len(hashes) else 0.0
            stats[name] = plain(share, len(self.columns()[self.names[0]]))
        return stats


def repeated_share(ngrams: Sequence[Ngram]) -> float:
    """Share of n-grams that repeat an earlier one."""
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def concatenated(state: list[Tensor] | Tensor) -> Tensor:
    """A state with `dist_reduce_fx="cat"`, which is a list until it is reduced over ranks."""
    return torch.cat(state) if isinstance(state, list) else state


def image_name(record: dict) -> str:
    """Name of a record's image without folder and ending: of its file `image`, or else of its key.

    The keys of prepared photos are NAME-HASH, with 16 hexadecimal digits (`src.preparation.photos`).
    """
    return re.sub(r"-[0-9a-f]{16}$", "", Path(str(record.get("image") or record["key"])).stem)


def hash64(text: str) -> int:
    """To count distinct texts, as only tensors can be reduced over ranks."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def hash53(text: str) -> float:
    """The same in the bits that a float64 holds exactly."""
    return float(hash64(text) & (2**53 - 1))
