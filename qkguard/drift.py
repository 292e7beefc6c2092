"""How far queries and keys have moved from before SFT: pure functions of numpy arrays or torch tensors.

Top to bottom: sums over elements (relative drift, cosine), then per block and per projection of a layer; routing drift
and singular values of a layer; and the names under which all of it is logged.

W0 is before SFT, W now. Everything is computed from differences W - W0 with float64 accumulation, never as
|W|^2 + |W0|^2 - 2<W,W0>, which is noise below a relative drift of 1e-3 in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite, sqrt
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qkguard.arrays import Array, along, double, library, like, single, zeros
from qkguard.layout.heads import find_heads
from qkguard.layout.selection import Selection
from qkguard.layout.spec import AttentionSpec, Block, ParamMap

if TYPE_CHECKING:
    from torch import Tensor

# Elements at a time. CPU: small enough to stay in the cache; accelerators: large enough to be bound by memory.
CPU_CHUNK = 1 << 18
ACCELERATOR_CHUNK = 3 << 22  # 200 MB at most
ROW = 1 << 14  # elements that an accelerator adds up in float32


class Sums(NamedTuple):
    """Sums over the elements of one matrix: |W - W0|^2, <W0, W - W0> and |W0|^2, in float64."""

    moved: float
    cross: float
    base: float

    @property
    def rel(self) -> float:
        """Relative Frobenius drift |W - W0| / |W0|; infinite where W0 is zero and W is not."""
        if self.base:
            return sqrt(self.moved / self.base)
        return float("inf") if self.moved else 0.0

    @property
    def one_minus_cos(self) -> float:
        """1 - cos(W, W0), from |W - W0|^2 so that it is exact where cos rounds to 1; nan where W or W0 is zero."""
        norm0 = sqrt(self.base)
        norm = sqrt(max(0.0, self.base + 2 * self.cross + self.moved))
        if not norm0 or not norm:
            return float("nan")
        longer = (2 * self.cross + self.moved) / (norm + norm0)  # |W| - |W0| without cancellation
        return max(0.0, self.moved - longer**2) / (2 * norm * norm0)


def difference_sums(live: Array, pre: Array) -> Array:
    """[|W - W0|^2, <W0, W - W0>] of two 1-D arrays of equal length and any float dtype.

    Returns float64 on `live`'s device. Differences are taken in float32; chunks are summed in float32 by `sum`, whose
    cascade (numpy's and torch's) keeps 1e-7 where a dot product loses 1e-5, and added in float64.
    """
    out = zeros(2, live)
    for w0, delta in _chunks(live, pre):
        out += library(live).stack([(delta * delta).sum(), (w0 * delta).sum()])
    return out


def launch_sums(pieces: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """`difference_sums` of many (W, W0), 1-D, begun on the accelerator of W; nothing here waits for it.

    Weights are joined, because launching kernels would take longer than running them. Returns (rows, 2) in float32 of
    some weights each: of every weight, one row after the other of `row_counts`, to be added in float64.
    """
    groups: list[list[tuple[Tensor, Tensor]]] = []
    room, kind = 0, None
    for live, pre in pieces:
        for start in range(0, len(live), ACCELERATOR_CHUNK):
            piece = live[start : start + ACCELERATOR_CHUNK], pre[start : start + ACCELERATOR_CHUNK]
            size = _padded(len(piece[0]))
            if size > room or kind != (live.device, pre.dtype):
                groups.append([])
                room, kind = ACCELERATOR_CHUNK, (live.device, pre.dtype)
            groups[-1].append(piece)
            room -= size
    return [_launch(group) for group in groups]


def row_counts(lengths: Iterable[int]) -> list[int]:
    """Into how many rows `launch_sums` divides weights of so many elements."""
    return [_padded(length) // ROW for length in lengths]


def _padded(length: int) -> int:
    return -(-length // ROW) * ROW


def _launch(group: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(rows, 2) of weights that fit a chunk together; two kernels for each, and four for all."""
    import torch

    live, pre = group[0]
    size = sum(_padded(len(live)) for live, _ in group)
    reserve = torch.empty if size == sum(len(live) for live, _ in group) else torch.zeros  # zeros add nothing
    before = reserve(size, dtype=pre.dtype, device=live.device)
    delta = reserve(size, dtype=torch.float32, device=live.device)
    start = 0
    for live, pre in group:
        before[start : start + len(pre)].copy_(pre, non_blocking=True)
        delta[start : start + len(live)].copy_(live)
        start += _padded(len(live))
    delta -= before
    products = torch.empty(2, size, dtype=torch.float32, device=live.device)
    torch.mul(delta, delta, out=products[0])
    torch.mul(before, delta, out=products[1])
    return products.view(2, -1, ROW).sum(-1).T


def square_sum(array: Array) -> float:
    """|W|^2 of a 1-D array with the accumulation of `difference_sums`."""
    total = zeros((), array)
    for w, _ in _chunks(array, array):
        total += (w * w).sum()
    return float(total)


def _chunks(live: Array, pre: Array) -> Iterator[tuple[Array, Array]]:
    """(W0, W - W0) of two 1-D arrays in float32, some elements at a time, where `live` is."""
    chunk = CPU_CHUNK if _on_cpu(live) else ACCELERATOR_CHUNK
    for start in range(0, len(live), chunk):
        before = pre[start : start + chunk]
        if not isinstance(before, np.ndarray):
            before = before.to(live.device, non_blocking=True)  # and converted there
        w0 = single(before)
        yield w0, single(live[start : start + chunk]) - w0


def _on_cpu(array: Array) -> bool:
    return isinstance(array, np.ndarray) or array.device.type == "cpu"


def add(sums: Sequence[Sums]) -> Sums:
    """Sums over the union of disjoint sets of elements."""
    return Sums(*(sum(column) for column in zip(*sums, strict=True)))


def rows_drift(post: Array, pre: Array) -> Sums:
    """The sums of drift over two arrays of one shape, `pre` before SFT."""
    out = zeros(3, post)
    for w0, delta in _chunks(post.reshape(-1), pre.reshape(-1)):
        out += library(post).stack([(delta * delta).sum(), (w0 * delta).sum(), (w0 * w0).sum()])
    return Sums(*out.tolist())


def block_drift(param: ParamMap, pre: Array, post: Array) -> list[tuple[Block, Sums]]:
    """Sums for every block (rows of one role and head) of one parameter's compact arrays."""
    out = []
    for block, lo, hi in param.compact_blocks():
        out.append((block, rows_drift(along(post, param.dim, lo, hi), along(pre, param.dim, lo, hi))))
    return out


def projection_drift(
    params: Sequence[ParamMap], pre: Mapping[str, Array], post: Mapping[str, Array]
) -> dict[str, float]:
    """`drift_of_blocks` of one layer from compact tensors by parameter name."""
    return drift_of_blocks(weight_blocks(params, pre, post))


def weight_blocks(
    params: Sequence[ParamMap], pre: Mapping[str, Array], post: Mapping[str, Array]
) -> list[tuple[Block, Sums]]:
    """`block_drift` of the weights among some parameters, for `drift_of_blocks`."""
    blocks: list[tuple[Block, Sums]] = []
    for param in params:
        if param.kind == "weight":
            blocks += block_drift(param, pre[param.name], post[param.name])
    return blocks


def drift_of_blocks(blocks: Sequence[tuple[Block, Sums]]) -> dict[str, float]:
    """{q,k}_rel and {q,k}_1mcos of one layer's W_Q and W_K, from the blocks of its weights, in their order.

    As in the metrics of training: all weights of a role count as one vector, biases and norms are left out, rows that
    feed both queries and keys count for both.
    """
    out: dict[str, float] = {}
    for role in "qk":
        out |= _role_drift(role, [sums for block, sums in blocks if role in block.role])
    return out


def _role_drift(role: str, sums: Sequence[Sums]) -> dict[str, float]:
    """The drift of queries or keys as one vector, by metric name; empty where there are none."""
    if not sums:
        return {}
    total = add(sums)
    return {f"{role}_rel": total.rel, f"{role}_1mcos": total.one_minus_cos}


def head_weights(
    spec: AttentionSpec, maps: Sequence[ParamMap], compact: Mapping[str, Array]
) -> tuple[Array, Array] | None:
    """Query (heads, d_k, d) and key (kv_heads, d_k, d) weights in float64 from compact tensors by parameter name.

    None where the routing matrix is not defined: it is where one weight makes the queries and one the keys, both from
    the same input and head by head. MLA's factored projections are not of this form.
    """
    heads = find_heads(spec, maps)
    if isinstance(heads, str):
        return None
    return heads.q.read(compact, with_bias=False), heads.k.read(compact, with_bias=False)


class Grams(NamedTuple):
    """Products of one projection's rows per head, (heads, d_k, d_k): W0 W0^T, dW W0^T and dW dW^T, dW = W - W0."""

    base: Array
    cross: Array
    moved: Array


def routing_drift(q: Array, q0: Array, k: Array, k0: Array) -> Array:
    """|R - R0|_F / |R0|_F per query head, where R = W_Q^T W_K is the routing matrix (arXiv 2606.11052).

    Args:
        q, q0: query weights now and before SFT, (heads, d_k, d).
        k, k0: key weights, (kv_heads, d_k, d); query head h reads key head `h // (heads // kv_heads)`.

    Returns:
        float64, (heads,). R itself (d x d) is never formed.
    """
    return routing_from_grams(_grams(double(q), double(q0)), _grams(double(k), double(k0)))


def _grams(now: Array, before: Array) -> Grams:
    delta = now - before
    return Grams(before @ before.mT, delta @ before.mT, delta @ delta.mT)


def routing_from_grams(q: Grams, k: Grams) -> Array:
    """`routing_drift` from the products of its weights, float64.

    With dQ = Q - Q0 and dK = K - K0,
    |R - R0|^2 = tr(dQ dQ^T K K^T) + tr(Q0 Q0^T dK dK^T) + 2 tr(dQ Q0^T dK K^T).
    """
    heads, kv_heads, size = len(q.base), len(k.base), k.base.shape[-1]

    def trace(queries: Array, keys: Array) -> Array:
        """tr(A B) per query head."""
        grouped = queries.reshape(kv_heads, heads // kv_heads, size, size)
        return (grouped * keys.mT[:, None]).sum((-1, -2)).reshape(heads)

    now = k.base + k.cross + k.cross.mT + k.moved
    moved = trace(q.moved, now) + trace(q.base, k.moved) + 2 * trace(q.cross, k.cross + k.moved)
    # Rounding can leave a head that did not move a little below zero.
    return library(moved).sqrt(moved.clip(0) / trace(q.base, k.base))


def top_singular_value(delta: Array, iterations: int = 12) -> float:
    """Largest singular value of a matrix (n, d) by block power iteration in float64, from a fixed start.

    A block of 8 vectors also finds it where the next ones lie close, as they do for a drift that is mostly noise
    (`tests/test_drift.py`: to 0.5% there, to 1e-6 where one value stands out).
    """
    delta, linalg = double(delta), library(delta).linalg
    if not library(delta).isfinite(delta).all():  # reported as such; the factorisations below would raise
        return float("nan")
    width = min(8, *delta.shape)
    # A generator of our own: training's is left alone, and numpy and torch start alike
    block = like(np.random.default_rng(0).standard_normal((delta.shape[1], width)), delta)
    for _ in range(iterations):
        block = linalg.qr(delta.mT @ (delta @ linalg.qr(block).Q)).Q
    return float(linalg.matrix_norm(delta @ block, ord=2))


class LayerRouting(NamedTuple):
    """Routing drift per query head (empty where R is not defined), and the top singular values of W - W0.

    A singular value is None where no weight, or more than one, makes that projection.
    """

    per_head: list[float]
    q_top_sv: float | None
    k_top_sv: float | None


def layer_routing(
    spec: AttentionSpec, maps: Sequence[ParamMap], pre: Mapping[str, Array], live: Mapping[str, Array]
) -> LayerRouting:
    """What one layer's compact weights, before SFT and now, say of its routing."""
    now, before = head_weights(spec, maps, live), head_weights(spec, maps, pre)
    routing = routing_drift(now[0], before[0], now[1], before[1]).tolist() if now and before else []
    return LayerRouting(routing, _top_sv(maps, pre, live, "q"), _top_sv(maps, pre, live, "k"))


def routing_table(selection: Selection, layers: Mapping[str, LayerRouting]) -> np.ndarray:
    """`layers`, by label, as float64 numbers, zeros for layers that are not in it: tables of several ranks add up.

    A row per selected layer: how many heads, routing drift per head, then for queries and keys each whether there is a
    singular value, and the value.
    """
    table = np.zeros((len(selection), _most_heads(selection) + 5))
    for i, row in enumerate(table):
        layer = layers.get(layer_label(i, selection))
        if layer is not None:
            tops = [[float(top is not None), top or 0.0] for top in (layer.q_top_sv, layer.k_top_sv)]
            row[0] = len(layer.per_head)
            row[1 : 1 + len(layer.per_head)] = layer.per_head
            row[-4:] = [*tops[0], *tops[1]]
    return table


def routing_from_table(selection: Selection, table: Array) -> dict[str, LayerRouting]:
    """The inverse of `routing_table`."""
    layers = {}
    for i, row in enumerate(table.tolist()):
        q, k = (value if there else None for there, value in (row[-4:-2], row[-2:]))
        layers[layer_label(i, selection)] = LayerRouting(row[1 : 1 + int(row[0])], q, k)
    return layers


def _most_heads(selection: Selection) -> int:
    return max(spec.num_heads for spec, _ in selection)


def sole_weight(maps: Sequence[ParamMap], role: str) -> tuple[ParamMap, np.ndarray] | None:
    """The weight that makes the queries or keys of a layer, and its rows of them in compact form; None unless one."""
    owners = [p for p in maps if p.kind == "weight" and any(role in block.role for block in p.blocks)]
    if len(owners) != 1:
        return None
    ranges = [np.arange(lo, hi) for block, lo, hi in owners[0].compact_blocks() if role in block.role]
    return owners[0], np.concat(ranges)


def _top_sv(maps: Sequence[ParamMap], pre: Mapping[str, Array], live: Mapping[str, Array], role: str) -> float | None:
    found = sole_weight(maps, role)
    if found is None:
        return None
    param, rows = found
    now, before = live[param.name], pre[param.name]
    delta = double(now) - double(before if _on_cpu(now) else before.to(now.device))
    return top_singular_value(delta[(slice(None),) * param.dim + (like(rows, delta),)])


def layer_label(index: int, selection: Selection) -> str:
    """The metric name of one selected layer: "layer_7", with a suffix where a layer holds two attention modules."""
    layer = selection[index][0].layer
    twins = [i for i, (spec, _) in enumerate(selection) if spec.layer == layer]
    return f"layer_{layer}" if len(twins) == 1 else f"layer_{layer}_{twins.index(index)}"


def layer_metrics(selection: Selection, sums: Mapping[tuple[str, str], Sums]) -> dict[str, float]:
    """Drift metrics by key from the sums of every (parameter, role): per layer, then mean and max over layers.

    `q_rel` and `k_rel` are of the projection weights W_Q and W_K (all weights that feed only queries, or only keys, of
    a layer, as one vector); biases have their own numbers in `drift_report`.
    """
    per_layer: dict[str, float] = {}
    of_weight: dict[str, list[tuple[str, Sums]]] = {}
    for (name, roles), found in sums.items():
        of_weight.setdefault(name, []).append((roles, found))
    for i, (_, maps) in enumerate(selection):
        weights = [param.name for param in maps if param.kind == "weight"]
        for role in "qk":
            own = [found for weight in weights for roles, found in of_weight.get(weight, []) if role in roles]
            drift = _role_drift(role, own)
            per_layer |= {f"{layer_label(i, selection)}/{name}": value for name, value in drift.items()}
    return _summarised(per_layer, ("q_rel", "k_rel"))


def routing_metrics(
    selection: Selection, layers: Mapping[str, LayerRouting]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics by key, and per-head routing drift by layer label, from `layer_routing` by layer label."""
    per_layer: dict[str, float] = {}
    heads: dict[str, list[float]] = {}
    for label in (layer_label(i, selection) for i in range(len(selection))):
        routing, q_top, k_top = layers[label]
        if routing:
            heads[label] = routing
            per_layer[f"{label}/routing_rel"] = sum(routing) / len(routing)
        if q_top is not None:
            per_layer[f"{label}/q_top_sv"] = q_top
        if k_top is not None:
            per_layer[f"{label}/k_top_sv"] = k_top
    return _summarised(per_layer, ("routing_rel",)), heads


def _summarised(per_layer: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Mean and largest over the layers of the metrics called `names`, then the layers, under their public keys."""
    out: dict[str, float] = {}
    for name in names:
        values = [value for key, value in per_layer.items() if key.endswith(f"/{name}")]
        if values:
            out[name] = sum(values) / len(values)
            out[f"{name}/max"] = largest(values)
    return {f"qkguard/drift/{name}": value for name, value in {**out, **per_layer}.items()}


def largest(values: Sequence[float]) -> float:
    """The maximum; nan where a value is not finite, which `max` would show or hide by their order."""
    return max(values) if all(map(isfinite, values)) else float("nan")
