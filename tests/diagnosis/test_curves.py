"""Decay lengths of curves whose length is known, their intervals, and self-similarity against a plain loop."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from qkguard.demo.arithmetic import problems
from qkguard.diagnosis.curves import (
    Curves,
    Estimate,
    correlation_length,
    decay_length,
    difference,
    estimate,
    resamples,
)
from qkguard.diagnosis.self_similarity import self_similarity
from tests.support.probing import bpe_tokenizer

ROOT = Path(__file__).parents[2]


def by_loop(vectors: Tensor) -> list[float]:
    """Excess self-similarity, pair by pair."""
    rows = [[float(v) for v in row] for row in vectors]
    count, size = len(rows), len(rows[0])
    mean = [sum(row[i] for row in rows) / count for i in range(size)]
    centred = [[row[i] - mean[i] for i in range(size)] for row in rows]
    power = sum(v * v for row in centred for v in row) / count
    out = []
    for distance in range(1, count):
        products = [
            sum(a * b for a, b in zip(centred[t], centred[t + distance], strict=True)) for t in range(count - distance)
        ]
        out.append(sum(products) / len(products) / power + 1 / (count - 1))
    return out


def test_self_similarity_is_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkguard.diagnosis.self_similarity._CHANNELS", 3)
    vectors = torch.randn(23, 7, generator=torch.Generator().manual_seed(0)).cumsum(0)
    values, pairs = self_similarity(vectors)
    assert values.tolist() == pytest.approx(by_loop(vectors), abs=1e-10)
    assert pairs.tolist() == list(range(22, 0, -1))
    assert values.tolist() != pytest.approx(by_loop(vectors.flip(1).roll(1, 0)), abs=1e-3)
    assert values @ pairs == pytest.approx(0, abs=1e-9)  # centred: near excess is taken from far
    assert values[0] > 0.3


def test_random_order_has_no_excess() -> None:
    vectors = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).cumsum(0)
    generator = torch.Generator().manual_seed(1)
    shuffled = [self_similarity(vectors[torch.randperm(12, generator=generator)])[0] for _ in range(4000)]
    # the mean of 4,000 orders, each with a spread of about 0.5 at most
    assert np.abs(np.mean(shuffled, 0))[:8].max() < 0.03 < self_similarity(vectors)[0][0]


def test_rows_without_variance_are_flat() -> None:
    assert self_similarity(torch.ones(5, 2))[0].tolist() == [0.0] * 4
    assert len(self_similarity(torch.ones(1, 2))[0]) == 0


@pytest.mark.parametrize("length", [3.0, 40.0, 172.0])
def test_an_exponential_decays_over_its_own_length(length: float) -> None:
    distance = np.arange(4000)
    curve = np.exp(-distance / length)
    assert decay_length(curve, np.ones(4000)) == pytest.approx(length, rel=1e-3)
    assert decay_length(7 * curve, np.full(4000, 3.0)) == pytest.approx(length, rel=1e-3)
    assert decay_length(np.exp(-distance / (2 * length)), np.ones(4000)) == pytest.approx(2 * length, rel=1e-3)


@pytest.mark.parametrize("length", [10.0, 60.0])
def test_an_oscillation_decays_over_the_length_of_its_envelope(length: float) -> None:
    distance = np.arange(1200)
    rng = np.random.default_rng(0)
    curve = np.exp(-distance / length) * np.cos(2 * np.pi * distance / 5)
    rows = [(curve + rng.normal(0, 0.02, 1200), np.arange(1200, 0.0, -1)) for _ in range(40)]
    found = correlation_length(Curves.of(rows), seed=0)
    assert found.low is not None and found.high is not None
    assert found.value == pytest.approx(length, rel=0.15) and found.low <= found.value <= found.high
    other = correlation_length(Curves.of([(-values, pairs) for values, pairs in rows]), seed=0)
    assert other.value == pytest.approx(found.value)


def test_squares_of_noise_are_around_zero() -> None:
    rng = np.random.default_rng(0)
    curves = Curves.of([(rng.normal(0, 1, 500), np.ones(500)) for _ in range(12)])
    squared, _ = curves.squared()
    assert abs(squared.mean()) < 0.01 < (curves.mean()[0] ** 2).mean()
    assert curves.chance(0) > 0.05 and correlation_length(curves, 0) == Estimate(0.0)
    by_hand = [curves.values[a] * curves.values[b] for a in range(12) for b in range(12) if a != b]
    assert squared.tolist() == pytest.approx(np.mean(by_hand, 0).tolist())
    assert math.isnan(correlation_length(Curves.of([(np.ones(3), np.ones(3))]), 0).value)  # nothing to agree with
    twice = np.array([2.0, *[1.0] * 11])  # a row drawn twice is not its own partner
    assert abs(curves.squared(twice)[0].mean()) < 0.02


def test_curves_without_excess_have_no_length() -> None:
    assert decay_length(np.array([-1.0, -1.0, 0.5]), np.ones(3)) == 0.0
    assert decay_length(np.zeros(4), np.ones(4)) == 0.0


def test_means_count_pairs() -> None:
    curves = Curves.of([(np.array([1.0, 3.0]), np.array([2.0, 1.0])), (np.array([4.0]), np.array([1.0]))])
    values, pairs = curves.mean()
    assert values.tolist() == [2.0, 3.0] and pairs.tolist() == [3.0, 1.0]
    assert curves.mean(np.array([0.0, 2.0]))[0].tolist() == [4.0, 0.0]


def test_intervals_narrow_with_rows_and_hold_the_truth() -> None:
    truth, widths = 20.0, []
    rng = np.random.default_rng(5)
    for rows in (8, 128):
        made = [np.exp(-np.arange(200) / truth * rng.uniform(0.6, 1.6)) for _ in range(rows)]
        found = estimate(Curves.of([(row, np.ones(200)) for row in made]).decay_length, rows, seed=0)
        assert found.low is not None and found.high is not None
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2
    assert estimate(Curves.of([(np.ones(3), np.ones(3))]).decay_length, 1, 0).low is None
    assert resamples(5, 3).sum(1).tolist() == [5.0] * 400 and (resamples(5, 3) != resamples(5, 4)).any()


def test_a_difference_of_equal_texts_spans_zero() -> None:
    rng = np.random.default_rng(0)
    made = [estimate(mean_of(rng.normal(mean, 1, 50)), 50, seed=0) for mean in (3.0, 3.0, 5.0)]
    same, other = difference(made[0], made[1]), difference(made[2], made[0])
    assert same.low is not None and same.high is not None and same.low < 0 < same.high
    assert other.low is not None and other.low > 1
    assert difference(Estimate(2.0), Estimate(0.5)).value == 1.5


def mean_of(values: np.ndarray) -> Callable[[np.ndarray], float]:
    def mean(weights: np.ndarray) -> float:
        return float(weights @ values / weights.sum())

    return mean


# -- texts ---------------------------------------------------------------------------------------------------------


def excess(rows: list[list[int]]) -> Estimate:
    """W_corr of rows of token ids, whose embeddings are random: tokens resemble themselves alone."""
    embedding = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    curves = Curves.of([self_similarity(embedding[torch.tensor(row)]) for row in rows])
    return correlation_length(curves, seed=0)


def shuffled(rows: list[list[int]], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.sample(row, len(row)) for row in rows]


def prose_rows() -> list[list[int]]:
    """English prose that does not change: the licence."""
    ids = bpe_tokenizer()((ROOT / "LICENSE").read_text())["input_ids"]
    return [ids[start : start + 200] for start in range(0, len(ids) - 200, 200)]


def cot_rows() -> list[list[int]]:
    """The lab's chains of thought in `word` style, tokenised by the demo's words."""
    words: dict[str, int] = {}
    rows = []
    rng = Random(0)
    for chain in islice(problems(1000), 24):
        opening = rng.choice(("so", "here", "again", "go"))
        work = "; ".join(f"{opening}, {line}" for line in chain.completion.split("; "))
        pieces = (chain.prompt + work).replace(";", " ;").replace(",", " ,").replace(".", " .").split()
        rows.append([words.setdefault(piece, len(words)) for piece in pieces])
    return rows


@pytest.mark.parametrize("text", [prose_rows, cot_rows])
def test_text_resembles_itself_over_more_tokens_than_when_shuffled(text: Callable[[], list[list[int]]]) -> None:
    rows = text()
    found = excess(rows)
    assert found.low is not None and found.low > 3
    lengths = [excess(shuffled(rows, seed)).value for seed in range(8)]
    assert lengths == [0.0] * 8, (found, lengths)


def test_few_orders_pass_for_text() -> None:
    """Rows that share nothing look alike about as often as the test says."""
    rng = np.random.default_rng(3)
    chances = [
        Curves.of([(rng.normal(0, 1, 60), np.arange(60, 0.0, -1)) for _ in range(12)]).chance(0) for _ in range(200)
    ]
    assert np.mean(np.array(chances) <= 0.1) == pytest.approx(0.1, abs=0.06)
    assert (
        Curves.of([(np.ones(5), np.ones(5))] * 7).chance(0)
        > 0.01
        > Curves.of([(np.ones(5), np.ones(5))] * 16).chance(0)
    )
