"""Is one system better than another? Paired by image or by seed, and corrected for the number of comparisons.

    one, other = clair_of_a.parts(), clair_of_b.parts()
    difference = compare(one, other)                       {"difference", "se", "low", "high", "p", "n"}
    paired_p([0.1, 0.3, 0.2])                              of differences by seed
    holm({"clair": difference["p"], ...})                  p-values of the family, adjusted

Bootstrap and t-test are SciPy's (the extra `eval`), which has no correction of Holm's.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from src.io.errors import UserError

BATCH = 500  # resamples at a time, which bounds the memory
Name = TypeVar("Name", bound=Hashable)


class Difference(TypedDict):
    """one - other, its standard error, a 95 % interval, a two-sided p-value, and the number of images."""

    difference: float
    se: float
    low: float
    high: float
    p: float
    n: int


def compare(
    one: tuple[ArrayLike, ArrayLike], other: tuple[ArrayLike, ArrayLike], *, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Paired bootstrap of the difference of two ratios sum(c) / sum(t), over images that both systems have.

    one, other: (c, t) of each, arrays over the images of the benchmark in the same order; t = 0: left out
    The p-value is twice the smaller share of resamples on one side of 0, both with one added: never 0.
    Raises UserError without SciPy, ValueError with fewer than two images.
    """
    stats = scipy_stats()

    def difference(c1: np.ndarray, t1: np.ndarray, c2: np.ndarray, t2: np.ndarray, axis: Any = -1) -> np.ndarray:
        return c1.sum(axis) / t1.sum(axis) - c2.sum(axis) / t2.sum(axis)

    (c1, t1), (c2, t2) = (tuple(np.asarray(part, dtype=np.float64) for part in system) for system in (one, other))
    shared = (t1 > 0) & (t2 > 0)
    parts = [part[shared] for part in (c1, t1, c2, t2)]
    result = stats.bootstrap(
        parts, difference, paired=True, vectorized=True, n_resamples=resamples, batch=BATCH, method="percentile",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    drawn = result.bootstrap_distribution
    side = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return {
        "difference": float(difference(*parts)),
        "se": float(result.standard_error),
        "low": float(result.confidence_interval.low),
        "high": float(result.confidence_interval.high),
        "p": float(min(1.0, 2 * (side + 1) / (resamples + 1))),
        "n": int(shared.sum()),
    }


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a paired t-test; None for fewer than two differences, or differences that are all equal."""
    if len(differences) < 2 or max(differences) == min(differences):
        return None
    return scipy_stats().ttest_1samp(differences, 0.0).pvalue.item()


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's step-down adjustment (1979): of m sorted p, max over j <= i of min(1, (m - j) p_j), j from 0."""
    adjusted, largest = {}, 0.0
    for number, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - number) * p))
        adjusted[name] = largest
    return adjusted


def scipy_stats() -> Any:
    try:
        import scipy.stats
    except ImportError as error:
        raise UserError("comparisons need SciPy: pip install rediff-lightning[eval]") from error
    return scipy.stats
