"""Comparisons of systems: the paired bootstrap against closed forms, Holm's correction against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from src.evaluation.statistics import compare, holm


def test_the_bootstrap_of_means_has_the_error_of_paired_differences():
    rng = np.random.default_rng(1)
    hard = rng.normal(size=400)  # images are hard for both systems
    one, other, ones = hard + 0.1 + 0.3 * rng.normal(size=400), hard + 0.3 * rng.normal(size=400), np.ones(400)
    result = compare((one, ones), (other, ones))
    paired = (one - other).std(ddof=1) / math.sqrt(400)
    assert result["difference"] == pytest.approx((one - other).mean(), abs=1e-12) and result["n"] == 400
    assert result["se"] == pytest.approx(paired, rel=0.03)  # unpaired it would be three times as large
    low, high = (result["difference"] + sign * 1.96 * paired for sign in (-1, 1))
    assert (result["low"], result["high"]) == pytest.approx((low, high), abs=0.1 * paired)
    z = result["difference"] / paired
    assert result["p"] == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.002) and result["p"] < 0.05
    assert result == compare((one, ones), (other, ones)) != compare((one, ones), (other, ones), seed=1)
    back = compare((other, ones), (one, ones))
    assert (back["difference"], back["p"]) == pytest.approx((-result["difference"], result["p"]))


def test_ratios_are_of_sums_over_images_that_both_have():
    rng = np.random.default_rng(2)
    totals = rng.integers(1, 40, size=300)
    right, worse = rng.binomial(totals, 0.6), rng.binomial(totals, 0.5)
    totals_of_other = np.where(np.arange(300) < 50, 0, totals)
    result = compare((right, totals), (np.where(totals_of_other, worse, 0), totals_of_other), resamples=2000)
    shared = slice(50, None)
    ratios = [counts[shared].sum() / totals[shared].sum() for counts in (right, worse)]
    assert result["difference"] == pytest.approx(ratios[0] - ratios[1], abs=1e-12) and result["n"] == 250
    residuals = (right - worse - (ratios[0] - ratios[1]) * totals)[shared]
    assert result["se"] == pytest.approx(residuals.std() * math.sqrt(250) / totals[shared].sum(), rel=0.06)
    assert result["p"] == pytest.approx(2 / 2001)  # no resample on the other side


def test_equal_systems_do_not_differ():
    values, ones = np.arange(20.0), np.ones(20)
    result = compare((values, ones), (values, ones), resamples=100)
    assert (result["difference"], result["se"], result["p"]) == (0, 0, 1)


@pytest.mark.parametrize(
    ("given", "adjusted"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 * 0.01; 2 * 0.03; max(0.04, 0.06)
        ([0.5, 0.001, 0.9], [1.0, 0.003, 1.0]),
        ([0.02], [0.02]),
        ([0.2, 0.2], [0.4, 0.4]),
        ([], []),
    ],
)
def test_holm(given, adjusted):
    assert holm(dict(enumerate(given))) == pytest.approx(dict(enumerate(adjusted)))
