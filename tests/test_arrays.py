"""Numpy arrays say what torch tensors say: casts to the bit, NaN and Inf, drift."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qkguard.arrays import as_array, as_tensor, cast, dtype_name, has_nonfinite, same_bits, sha256_of
from qkguard.drift import block_drift, layer_routing, projection_drift, routing_drift, top_singular_value
from qkguard.layout import AttentionSpec, Block, ParamMap

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def values(dtype: torch.dtype) -> Tensor:
    """Ordinary numbers, ties between neighbours of every format, subnormals, extremes and both zeros."""
    noise = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ties = 1 + torch.arange(256, dtype=torch.float64) * 2.0**-9 + 2.0**-40
    small = 2.0 ** -torch.arange(1.0, 160, dtype=torch.float64) * 1.5
    large = 2.0 ** torch.arange(1.0, 127, dtype=torch.float64) * 1.75
    every = torch.cat(
        [noise, ties, 1 + torch.arange(4096) * 2.0**-12, small, large, torch.tensor([0.0, 65519, 65520])]
    )
    return torch.cat([every, -every]).to(dtype)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_casts_have_torchs_bits(source: torch.dtype, target: torch.dtype) -> None:
    given = values(source)
    wanted, found = given.to(target), cast(as_array(given), as_array(given.to(target)).dtype)
    assert same_bits(as_tensor(found), wanted) and sha256_of(found) == sha256_of(wanted)
    assert dtype_name(found.dtype) == dtype_name(target)
    if source != target:
        assert not same_bits(found, as_array(given))
    assert not same_bits(found[1:], as_array(wanted)[:-1])


def test_one_rounding_would_not_be_torchs() -> None:
    """From float64 to a half torch rounds twice; numpy alone rounds once, which shows just above a tie."""
    given = np.array([1 + 2.0**-11 + 2.0**-40])
    assert cast(given, np.dtype(np.float16)) == as_array(torch.from_numpy(given).half()) == 1
    assert given.astype(np.float16) > 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, bad: float) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.tensor([largest, -largest, 0.0, -0.0, torch.finfo(dtype).tiny], dtype=torch.float64).to(dtype)
    assert not has_nonfinite(as_array(rows)) and not has_nonfinite(as_array(rows[:0]))
    for place in range(len(rows)):
        broken = rows.clone()
        broken[place] = bad
        assert has_nonfinite(as_array(broken)) and has_nonfinite(as_array(-broken))


def layer(dtype: torch.dtype, dim: int) -> tuple[AttentionSpec, dict[str, Tensor], dict[str, Tensor]]:
    """A layer of four query heads and two key heads, before and after a small step."""
    draw = torch.Generator().manual_seed(1)
    params, pre, post = [], {}, {}
    for role, heads in (("q", 4), ("k", 2)):
        blocks = tuple(Block(16 * h, 16 * h + 16, role, h) for h in range(heads))
        shape = (16 * heads, 640) if dim == 0 else (640, 16 * heads)
        params.append(ParamMap(f"{role}.weight", shape, dim, "weight", blocks))
        weight = torch.randn(shape, generator=draw)
        pre[f"{role}.weight"] = weight.to(dtype)
        post[f"{role}.weight"] = (weight + 0.1 * torch.randn(shape, generator=draw)).to(dtype)
    return AttentionSpec(0, "attn", "full_attention", 4, 2, 16, tuple(params)), pre, post


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [0, 1])
def test_drift_is_the_same_from_arrays_and_from_tensors(dtype: torch.dtype, dim: int) -> None:
    spec, pre, post = layer(dtype, dim)
    arrays = [{name: as_array(rows) for name, rows in side.items()} for side in (pre, post)]
    found = projection_drift(spec.params, *arrays)
    assert found == pytest.approx(projection_drift(spec.params, pre, post), rel=1e-6)
    assert found != pytest.approx(projection_drift(spec.params, post, pre), rel=1e-6)
    for param in spec.params:
        mine = block_drift(param, arrays[0][param.name], arrays[1][param.name])
        theirs = block_drift(param, pre[param.name], post[param.name])
        assert [block for block, _ in mine] == [block for block, _ in theirs]
        for (_, a), (_, b) in zip(mine, theirs, strict=True):
            assert (a.moved, a.base) == pytest.approx((b.moved, b.base), rel=1e-6)
            assert a.cross == pytest.approx(b.cross, abs=1e-6 * (b.moved * b.base) ** 0.5)  # its terms cancel
    mine, theirs = layer_routing(spec, spec.params, *arrays), layer_routing(spec, spec.params, pre, post)
    assert mine.per_head == pytest.approx(theirs.per_head, rel=1e-9) and len(mine.per_head) == 4
    assert mine[1:] == pytest.approx(theirs[1:], rel=1e-9)
    q, k = (np.random.default_rng(n).standard_normal((2, 8, 40)) for n in (1, 2))
    assert routing_drift(q, q, k, k).max() == 0 < routing_drift(q, k, k, k).min()
    assert np.isnan(top_singular_value(np.full((3, 2), np.inf)))
