"""Curves over the distance between two tokens, the length over which they decay, and how sure that length is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

INSIDE = 1 - math.exp(-1)
"""Of a curve that falls off as exp(-d / W), this share lies within W."""

DRAWS = 400  # bootstrap draws: the 95% bounds are then the tenth from either end
LEVEL = 0.05

FLIPS = 1000
SURE = 0.01
"""Of the test of whether rows share a curve, by so many random signs: text in random order passes it once in a hundred
times, and fewer than 8 rows never do."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval over rows; without an interval (None) where there is a single row."""

    value: float
    low: float | None = None
    high: float | None = None
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """value, low, high."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Curves:
    """A curve per row of text.

    `values` and `pairs` (rows, distances) in float64: mean over a row's pairs of tokens at each distance, and how many
    pairs these are (0 beyond the row, or where a layer does not look).
    """

    values: np.ndarray
    pairs: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Curves:
        """From (values, pairs) of every row, of whatever lengths."""
        longest = max(len(values) for values, _ in rows)
        padded = np.zeros((2, len(rows), longest))
        for number, row in enumerate(rows):
            for part, numbers in enumerate(row):
                padded[part, number, : len(numbers)] = numbers
        return cls(padded[0], padded[1])

    def mean(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(values, pairs) of all rows together, every pair counting once, or as often as its row's weight says."""
        weights = np.ones(len(self.values)) if weights is None else weights
        pairs = weights @ self.pairs
        total = weights @ (self.values * self.pairs)
        return np.divide(total, pairs, out=np.zeros_like(total), where=pairs > 0), pairs

    def decay_length(self, weights: np.ndarray | None = None) -> float:
        """`decay_length` of the mean curve."""
        return decay_length(*self.mean(weights))

    def squared(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(values, pairs): the square of the mean curve without its bias, and how many pairs.

        Squares of a mean over rows are above zero by chance alone. Products of different rows are not: their mean
        over all pairs of rows is the square of what rows have in common, and around zero where that is nothing.
        """
        weights = np.ones(len(self.values)) if weights is None else weights
        pairs = self.pairs * weights[:, None]
        sums = self.values * pairs
        products = sums.sum(0) ** 2 - (sums**2).sum(0)
        count = pairs.sum(0) ** 2 - (pairs**2).sum(0)
        return np.divide(products, count, out=np.zeros_like(products), where=count > 0), pairs.sum(0)

    def correlation_length(self, weights: np.ndarray | None = None) -> float:
        """Length over which a curve around zero decays, whatever its signs: exp(-d / W) squared has the length W / 2.

        Text oscillates: a word is seldom followed by itself, lines repeat with a period. Squares keep both signs, and
        what centring takes from the far end is too small in them to count.
        """
        return 2 * decay_length(*self.squared(weights))

    def chance(self, seed: int) -> float:
        """How often rows that share nothing would look as alike as these: the p-value of a test by random signs.

        Rows without a common curve are as likely to be found with the other sign. The statistic is what the length is
        taken from, the largest sum of `squared` from the nearest distance on: choosing its end is part of the test.
        """
        sums, pairs = self.values * self.pairs, self.pairs.sum(0)
        count = pairs**2 - (self.pairs**2).sum(0)  # 0 where no two rows reach so far
        weight = np.divide(pairs, count, out=np.zeros_like(pairs), where=count > 0)
        own = (sums**2).sum(0)
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (FLIPS, len(sums)))
        signs[0] = 1  # as they are
        peaks = np.cumsum(((signs @ sums) ** 2 - own) * weight, axis=1).max(1)
        return float((peaks >= peaks[0] * (1 - 1e-12)).mean())


def decay_length(values: np.ndarray, pairs: np.ndarray) -> float:
    """The distance within which 1 - 1/e (63%) of a curve's excess over pairs lies; 0 for a curve without any.

    The excess is summed over pairs from the nearest distance on, up to where the sum is largest: for a curve above
    zero that is all of it. For exp(-d / W) over many times W tokens the result is W.

    Args:
        values: (distances,) means over pairs of tokens.
        pairs: (distances,) how many pairs.

    Returns:
        A number of distances, from the first one on, with a fraction of the last.
    """
    mass = np.cumsum(values * pairs)
    peak = int(mass.argmax())
    if not mass[peak] > 0:
        return 0.0
    place = int(np.searchsorted(mass[: peak + 1], INSIDE * mass[peak]))
    before = mass[place - 1] if place else 0.0
    return place + float((INSIDE * mass[peak] - before) / (mass[place] - before))


def resamples(rows: int, seed: int, draws: int = DRAWS) -> np.ndarray:
    """(draws, rows) how often every row is drawn in a bootstrap sample."""
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), draws).astype(float)


def estimate(of: Callable[[np.ndarray], float], rows: int, seed: int) -> Estimate:
    """`of(weights of the rows)` for all rows, with its interval over bootstrap samples of them."""
    value = of(np.ones(rows))
    if rows < 2:
        return Estimate(value)
    draws = np.array([of(weights) for weights in resamples(rows, seed)])
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2])
    return Estimate(value, float(low), float(high), draws)


def correlation_length(curves: Curves, seed: int) -> Estimate:
    """`Curves.correlation_length` with its interval.

    0 without one where rows share no curve (`SURE`); NaN for a single row, which has none to share it with.
    """
    if len(curves.values) < 2:
        return Estimate(math.nan)
    if curves.chance(seed) > SURE:
        return Estimate(0.0)
    return estimate(curves.correlation_length, len(curves.values), seed)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """one - other, of independent rows."""
    value = one.value - other.value
    if one.draws is None or other.draws is None:
        return Estimate(value)
    draws = one.draws - np.random.default_rng(0).permutation(other.draws)  # drawn with the same seed
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2])
    return Estimate(value, float(low), float(high), draws)
