"""Intervals against scipy and by enumeration, the paired test, the floor, and the words for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from scipy.stats import binomtest

from qkguard.probe.statistics import at_floor, paired_interval, sign_test, wilson
from qkguard.probe.words import change_in_points, floor_clause

Interval = Callable[[int, int, int], tuple[float, float]]


def test_wilson_is_scipys() -> None:
    for hits, count in ((0, 5), (3, 10), (20, 20), (1, 300)):
        interval = binomtest(hits, count).proportion_ci(method="wilson")
        assert wilson(hits, count) == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 90)[1] > 0.03 and wilson(90, 90)[0] < 0.97, "no certainty at the ends"


def least_coverage(interval: Interval, count: int) -> float:
    """The smallest probability that the interval holds the true fall, over chances of losing and gaining a sample."""
    bounds = {(b, c): interval(b, c, count) for b in range(count + 1) for c in range(count + 1 - b)}
    least = 1.0
    for down, up in itertools.product((0, 0.01, 0.05, 0.1, 0.3, 0.6), (0, 0.01, 0.05, 0.2)):
        covered = 0.0
        for (b, c), (low, high) in bounds.items():
            ways = math.comb(count, b) * math.comb(count - b, c)
            if low - 1e-12 <= down - up <= high + 1e-12:
                covered += ways * down**b * up**c * (1 - down - up) ** (count - b - c)
        least = min(least, covered)
    return least


def wald(lost: int, gained: int, count: int) -> tuple[float, float]:
    fall = (lost - gained) / count
    half = 1.96 * math.sqrt(((lost + gained) / count - fall * fall) / count)
    return fall - half, fall + half


@pytest.mark.parametrize("count", [20, 30, 60])
def test_the_interval_of_a_paired_difference_covers_it_also_where_nothing_changed(count: int) -> None:
    assert least_coverage(paired_interval, count) >= 0.925  # 95% on average; the docstring's bounds
    assert least_coverage(wald, count) < 0.6, "an interval that collapses is found"


def test_the_interval_of_a_paired_difference_at_its_ends() -> None:
    low, high = paired_interval(0, 0, 90)
    assert low == -high and high == pytest.approx(0.0301, abs=1e-4)
    low, high = paired_interval(30, 0, 30)
    assert 0.8 < low < 1 and high == 1.0
    assert paired_interval(3, 9, 50) == pytest.approx([-x for x in reversed(paired_interval(9, 3, 50))])


def test_the_sign_test_is_scipys() -> None:
    for lost, gained in ((5, 0), (4, 1), (0, 4), (10, 10)):
        expected = binomtest(lost, lost + gained, alternative="greater").pvalue
        assert sign_test(lost, gained) == pytest.approx(expected)
    assert sign_test(0, 0) == 1.0


@pytest.mark.parametrize(
    ("hits", "count", "floor"),
    [
        (0, 90, True),
        (0, 2, True),
        (3, 90, True),
        (4, 90, True),
        (5, 90, False),
        (2, 2, False),
        (4, 10, False),
        (0, 0, False),
    ],
)
def test_floor(hits: int, count: int, floor: bool) -> None:
    assert at_floor(hits, count) is floor


def test_words() -> None:
    assert floor_clause(0, 90) == "the base finds no needles here (0 of 90), so this probe cannot show a loss"
    assert floor_clause(3, 90, "it").startswith("it finds only 3 of 90 needles here, so")
    nothing = {"value": -0.0, "low": -0.03, "high": 0.03, "count": 90}
    assert change_in_points(nothing) == "no difference measured (90 samples)"
    fall = {"value": -0.2, "low": -0.31, "high": -0.09, "count": 90}
    assert change_in_points(fall) == "-20.0 points (95% -31.0 to -9.0)"
