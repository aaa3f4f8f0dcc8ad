"""Is one system better than another? Paired by image, and corrected for the number of comparisons.

    one, other = clair_of_a.parts(), clair_of_b.parts()
    difference = compare(one, other)                       {"difference", "se", "low", "high", "p", "n"}
    holm([difference["p"], ...])                           p-values of the family, adjusted

Plain NumPy: SciPy's bootstrap resamples one array of values, but most of these metrics are ratios of two sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike

CHUNK = 500  # resamples at a time


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
    Raises ValueError if no image is left.
    """
    (c1, t1), (c2, t2) = (tuple(np.asarray(part, dtype=np.float64) for part in system) for system in (one, other))
    shared = (t1 > 0) & (t2 > 0)
    parts, n = np.stack([c1, t1, c2, t2])[:, shared], int(shared.sum())
    if not n:
        raise ValueError("no image was scored for both systems")
    rng, differences = np.random.default_rng(seed), []
    for start in range(0, resamples, CHUNK):
        times = rng.multinomial(n, np.full(n, 1 / n), size=min(CHUNK, resamples - start))  # of each image
        c1, t1, c2, t2 = parts @ times.T
        differences.append(c1 / t1 - c2 / t2)
    drawn = np.concatenate(differences)
    c1, t1, c2, t2 = parts.sum(1)
    side = min((drawn <= 0).sum(), (drawn >= 0).sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "difference": float(c1 / t1 - c2 / t2),
        "se": float(drawn.std(ddof=1)),
        "low": float(low),
        "high": float(high),
        "p": float(min(1.0, 2 * (side + 1) / (resamples + 1))),
        "n": n,
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given: reject those below the level."""
    p = np.asarray(p_values, dtype=np.float64)
    order = p.argsort(kind="stable")
    adjusted = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted[order.argsort()].tolist()
