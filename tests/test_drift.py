"""Drift numbers against float64 formulas that share nothing with the project."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qkguard.drift import (
    ROW,
    Sums,
    difference_sums,
    launch_sums,
    routing_drift,
    row_counts,
    square_sum,
    top_singular_value,
)

SCALES = [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]


def _pair(scale, dtype=torch.float32, shape=(96, 4096), seed=0):
    g = torch.Generator().manual_seed(seed)
    w0 = torch.randn(shape, generator=g, dtype=torch.float64) * 0.02
    w = w0 + scale * 0.02 * torch.randn(shape, generator=g, dtype=torch.float64)
    return w.to(dtype), w0.to(dtype)


def _sums(w, w0):
    moved, cross = difference_sums(w.reshape(-1), w0.reshape(-1)).tolist()
    return Sums(moved, cross, square_sum(w0.reshape(-1)))


@pytest.mark.parametrize("scale", SCALES)
def test_relative_drift_and_cosine_match_float64(scale):
    w, w0 = _pair(scale)
    a, b = w.double().numpy().ravel(), w0.double().numpy().ravel()
    sums = _sums(w, w0)
    assert sums.rel == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-6)
    longa, longb = a.astype(np.longdouble), b.astype(np.longdouble)
    cosine = (longa @ longb) / (np.sqrt(longa @ longa) * np.sqrt(longb @ longb))
    if scale >= 1e-5:  # below, even extended precision cannot take cos from 1
        assert sums.one_minus_cos == pytest.approx(float(1 - cosine), rel=1e-4)
    assert sums.one_minus_cos == pytest.approx(sums.rel**2 / 2, rel=0.05)
    assert _sums(w0, w0).rel == 0 and _sums(w0 * (1 + 2 * scale), w0).rel != pytest.approx(sums.rel, rel=1e-3)


def test_bfloat16_drift_is_that_of_the_stored_values():
    w, w0 = _pair(1e-2, torch.bfloat16)
    a, b = w.double().numpy(), w0.double().numpy()
    assert _sums(w, w0).rel == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_joined_weights_are_those_of_each(dtype, monkeypatch):
    """What an accelerator runs, over weights of uneven lengths, one of them longer than a chunk."""
    monkeypatch.setattr("qkguard.drift.ACCELERATOR_CHUNK", 4 * ROW)
    lengths = [100, ROW, 3 * ROW + 1, 9 * ROW + 5, 1, 2 * ROW]
    pairs = [_pair(1e-3, dtype, (length,), seed) for seed, length in enumerate(lengths)]
    found = launch_sums(pairs)
    assert all(len(rows) <= 4 for rows in found) and len(found) < len(lengths) + 2, "joined, and of bounded size"
    of_weight = torch.cat(found).double().split(row_counts(lengths))
    assert len(of_weight) == len(pairs)
    for rows, (w, w0) in zip(of_weight, pairs, strict=True):
        a, b = w.double(), w0.double()
        moved, cross = rows.sum(0).tolist()
        assert moved == pytest.approx(float(((a - b) ** 2).sum()), rel=1e-6)
        assert cross == pytest.approx(float((b * (a - b)).sum()), abs=1e-6 * float(a.norm() * (a - b).norm()))
    assert float(of_weight[0].sum(0)[0]) != pytest.approx(float(of_weight[1].sum(0)[0]), rel=1e-3)


class Kernels(TorchDispatchMode):
    """Counts the operations that would launch a kernel on an accelerator: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "empty" not in func.__name__
        return func(*args, **kwargs or {})


def test_few_kernels_are_launched_for_many_weights():
    w = torch.zeros(2 * ROW)
    with Kernels() as joined:
        launch_sums([(w, w)] * 100)
    with Kernels() as single:
        for _ in range(100):
            difference_sums(w, w)
    assert joined.count == 2 * 100 + 4 and single.count > 3 * joined.count


def test_pure_scaling_has_no_angle():
    _, w0 = _pair(0)
    assert _sums(w0 * 1.5, w0).rel == pytest.approx(0.5, rel=1e-6)
    assert _sums(w0 * 1.5, w0).one_minus_cos < 1e-7


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("groups", [1, 2])
def test_routing_drift_matches_the_dense_routing_matrix(scale, groups):
    heads, d_k, d = 4, 8, 40
    q, q0 = _pair(scale, torch.float64, (heads, d_k, d), 1)
    k, k0 = _pair(scale, torch.float64, (heads // groups, d_k, d), 2)
    got = routing_drift(q, q0, k, k0)
    for h in range(heads):
        r = q[h].numpy().T @ k[h // groups].numpy()
        r0 = q0[h].numpy().T @ k0[h // groups].numpy()
        assert float(got[h]) == pytest.approx(np.linalg.norm(r - r0) / np.linalg.norm(r0), rel=1e-6)


def test_a_shared_rotation_moves_the_weights_but_not_the_routing():
    q0, k0 = (_pair(0, torch.float64, (2, 8, 40), s)[1] for s in (1, 2))
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    assert routing_drift(turn @ q0, q0, turn @ k0, k0).max() < 1e-7
    assert routing_drift(turn @ q0, q0, k0, k0).min() > 0.1
    assert _sums(turn @ q0, q0).rel > 0.5


def test_top_singular_value_matches_svd_and_leaves_the_rng_alone():
    before = torch.get_rng_state()
    noise = _pair(0)[1][:, :64].double()
    spiked = noise.clone()
    spiked[:, 0] *= 30
    for delta, tolerance in ((spiked, 1e-6), (noise, 5e-3)):
        assert top_singular_value(delta) == pytest.approx(float(torch.linalg.svdvals(delta)[0]), rel=tolerance)
    assert torch.equal(before, torch.get_rng_state())
    assert top_singular_value(torch.zeros(4, 3)) == 0
