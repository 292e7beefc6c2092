"""How far queries and keys have moved from before SFT: pure functions of tensors.

Everything is computed from differences W - W0 with float64 accumulation, never as |W|^2 + |W0|^2 - 2<W,W0>, which is
noise below a relative drift of 1e-3 in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from qkguard.layout.selection import Selection
from qkguard.layout.spec import AttentionSpec, Block, ParamMap

# CPU: small enough to stay in the cache; accelerators: large enough to be bound by memory
_CHUNK = {"cpu": 1 << 18}
_CHUNK_ACCELERATOR = 1 << 24


class Sums(NamedTuple):
    """Sums over the elements of one matrix: |W - W0|^2, <W0, W - W0> and |W0|^2, in float64."""

    moved: float
    cross: float
    base: float

    @property
    def rel(self) -> float:
        """Relative Frobenius drift |W - W0| / |W0|."""
        return sqrt(self.moved / self.base) if self.base else (0.0 if self.moved == 0 else float("inf"))

    @property
    def one_minus_cos(self) -> float:
        """1 - cos(W, W0), from |W - W0|^2 so that it is exact where cos rounds to 1."""
        norm0 = sqrt(self.base)
        norm = sqrt(max(0.0, self.base + 2 * self.cross + self.moved))
        if not norm0 or not norm:
            return float("nan")
        longer = (2 * self.cross + self.moved) / (norm + norm0)  # |W| - |W0| without cancellation
        return max(0.0, self.moved - longer**2) / (2 * norm * norm0)


def difference_sums(live: Tensor, pre: Tensor) -> Tensor:
    """[|W - W0|^2, <W0, W - W0>] of two 1-D tensors of equal length, float64 on `live`'s device.

    Differences are taken in float32; chunks are summed in float32 by torch.sum, whose cascade keeps 1e-7 where
    torch.dot loses 1e-5, and added in float64.
    """
    out = torch.zeros(2, dtype=torch.float64, device=live.device)
    chunk = _CHUNK.get(live.device.type, _CHUNK_ACCELERATOR)
    for start in range(0, live.numel(), chunk):
        w0 = pre[start : start + chunk].to(live.device, non_blocking=True).float()  # converted where live is
        delta = live[start : start + chunk].float() - w0
        out += torch.stack(((delta * delta).sum(), (w0 * delta).sum()))
    return out


def square_sum(tensor: Tensor) -> float:
    """|W|^2 of a 1-D tensor with the accumulation of `difference_sums`."""
    return float(difference_sums(tensor, torch.zeros((), dtype=tensor.dtype).expand(tensor.numel()))[0])


def add(sums: Sequence[Sums]) -> Sums:
    """Sums over the union of disjoint sets of elements."""
    return Sums(*(sum(column) for column in zip(*sums, strict=True)))


def routing_drift(q: Tensor, q0: Tensor, k: Tensor, k0: Tensor) -> Tensor:
    """|R - R0|_F / |R0|_F per query head, where R = W_Q^T W_K is the routing matrix.

    Args:
        q, q0: query weights now and before SFT, (heads, d_k, d).
        k, k0: key weights, (kv_heads, d_k, d); query head h reads key head `h // (heads // kv_heads)`.

    Returns:
        float64, (heads,). R itself (d x d) is never formed: with dQ = Q - Q0 and dK = K - K0,
        |R - R0|^2 = tr(dQ dQ^T K K^T) + tr(Q0 Q0^T dK dK^T) + 2 tr(dQ Q0^T dK K^T).
    """
    q, q0, k, k0 = (t.double() for t in (q, q0, k, k0))
    group = q.shape[0] // k.shape[0]
    dq, dk = q - q0, k - k0

    def gram(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.mT

    def traced(a: Tensor, b: Tensor) -> Tensor:  # tr(A B) per head
        return (a * b.mT).sum((-1, -2))

    def keys(a: Tensor) -> Tensor:
        return a.repeat_interleave(group, 0)

    moved = (
        traced(gram(dq, dq), keys(gram(k, k)))
        + traced(gram(q0, q0), keys(gram(dk, dk)))
        + 2 * traced(gram(dq, q0), keys(gram(dk, k)))
    )
    return (moved.clamp_min(0) / traced(gram(q0, q0), keys(gram(k0, k0)))).sqrt()


def top_singular_value(delta: Tensor, iterations: int = 12) -> float:
    """Largest singular value of a matrix (n, d) by block power iteration in float64, from a fixed start.

    A block of 8 vectors also finds it where the next ones lie close, as they do for a drift that is mostly noise.
    """
    delta = delta.double()
    if not delta.isfinite().all():  # reported as such; the factorisations below would raise
        return float("nan")
    start = torch.Generator().manual_seed(0)  # our own generator: training's RNG is left alone
    width = min(8, *delta.shape)
    block = torch.randn(delta.shape[1], width, generator=start, dtype=torch.float64).to(delta.device)
    for _ in range(iterations):
        block = torch.linalg.qr(delta.mT @ (delta @ torch.linalg.qr(block).Q)).Q
    return float(torch.linalg.matrix_norm(delta @ block, 2))


def head_weights(
    spec: AttentionSpec, maps: Sequence[ParamMap], compact: dict[str, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Query (heads, d_k, d) and key (kv_heads, d_k, d) weights from compact tensors, or None where R is not defined.

    It is defined where one weight makes the queries and one the keys, both from the same input and head by head;
    MLA's factored projections are not of this form.
    """
    whole = [p for p in spec.params if p.kind == "weight"]
    sources = {role: {p.name for p in whole if any(role in b.role for b in p.blocks)} for role in "qk"}
    if any(len(names) != 1 for names in sources.values()) or any(b.shared for p in whole for b in p.blocks):
        return None
    stacked: dict[str, Tensor] = {}
    for role, count in (("q", spec.num_heads), ("k", spec.num_kv_heads)):
        heads: list[list[Tensor]] = [[] for _ in range(count)]
        for pmap in maps:
            if pmap.kind == "weight" and pmap.name in sources[role]:
                for block, lo, hi in pmap.compact_blocks():
                    if block.role == role and block.head is not None:
                        rows = compact[pmap.name].narrow(pmap.dim, lo, hi - lo)
                        heads[block.head].append(rows if pmap.dim == 0 else rows.mT)
        joined = [torch.cat(rows) for rows in heads if rows]
        if len(joined) != count or len({t.shape for t in joined}) != 1:
            return None
        stacked[role] = torch.stack(joined)
    q, k = stacked["q"], stacked["k"]
    return (q, k) if q.shape[1:] == k.shape[1:] and len(q) % len(k) == 0 else None


def layer_label(index: int, selection: Selection) -> str:
    """The metric name of one selected layer: "layer_7", with a suffix where a layer holds two attention modules."""
    layer = selection[index][0].layer
    twins = [i for i, (spec, _) in enumerate(selection) if spec.layer == layer]
    return f"layer_{layer}" if len(twins) == 1 else f"layer_{layer}_{twins.index(index)}"


def layer_metrics(selection: Selection, sums: dict[tuple[str, str], Sums]) -> dict[str, float]:
    """Drift metrics by key from the sums of every (parameter, role): per layer, then mean and max over layers.

    `q_rel` and `k_rel` are of the projection weights W_Q and W_K (all weights that feed only queries, or only keys, of
    a layer, as one vector); biases have their own numbers in `drift_report`.
    """
    out: dict[str, float] = {}
    means: dict[str, list[float]] = {"q_rel": [], "k_rel": []}
    for i, (_, maps) in enumerate(selection):
        label = layer_label(i, selection)
        for role in "qk":
            mine = [s for p in maps if p.kind == "weight" for (n, r), s in sums.items() if n == p.name and role in r]
            if mine:
                total = add(mine)
                out[f"{label}/{role}_rel"] = total.rel
                out[f"{label}/{role}_1mcos"] = total.one_minus_cos
                means[f"{role}_rel"].append(total.rel)
    return _summarised(out, means)


def routing_metrics(
    selection: Selection, layers: Mapping[str, tuple[list[float], float | None, float | None]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics by key, and per-head routing drift by layer label, from what `layer_routing` gave for every label."""
    per_layer: dict[str, float] = {}
    heads: dict[str, list[float]] = {}
    for label in (layer_label(i, selection) for i in range(len(selection))):
        routing, q_top, k_top = layers[label]
        if routing:
            heads[label] = routing
            per_layer[f"{label}/routing_rel"] = sum(routing) / len(routing)
        per_layer |= {f"{label}/{n}": v for n, v in (("q_top_sv", q_top), ("k_top_sv", k_top)) if v is not None}
    means = {"routing_rel": [v for k, v in per_layer.items() if k.endswith("/routing_rel")]}
    return _summarised(per_layer, means), heads


def largest(values: Sequence[float]) -> float:
    """The maximum; nan where a value is not finite, which `max` would show or hide by their order."""
    return max(values) if all(map(isfinite, values)) else float("nan")


def _summarised(per_layer: dict[str, float], means: dict[str, list[float]]) -> dict[str, float]:
    """Mean and largest of each kind over the layers, then the layers, under the names of the metrics."""
    out = {}
    for name, values in means.items():
        if values:
            out[name] = sum(values) / len(values)
            out[f"{name}/max"] = largest(values)
    return {f"qkguard/drift/{name}": value for name, value in (out | per_layer).items()}


def layer_routing(
    spec: AttentionSpec, maps: Sequence[ParamMap], pre: dict[str, Tensor], live: dict[str, Tensor]
) -> tuple[list[float], float | None, float | None]:
    """(routing drift per head, top singular value of W_Q - W_Q0, of W_K - W_K0) of one layer from compact tensors.

    The routing list is empty where R is not defined (`head_weights`); a singular value is None where no weight, or
    more than one, makes that part.
    """
    now, before = head_weights(spec, maps, live), head_weights(spec, maps, pre)
    routing = routing_drift(now[0], before[0], now[1], before[1]).tolist() if now and before else []
    tops: list[float | None] = []
    for role in "qk":
        owners = [p for p in maps if p.kind == "weight" and any(role in b.role for b in p.blocks)]
        if len(owners) != 1:
            tops.append(None)
            continue
        pmap = owners[0]
        rows = torch.cat([torch.arange(lo, hi) for b, lo, hi in pmap.compact_blocks() if role in b.role])
        delta = live[pmap.name].double() - pre[pmap.name].double().to(live[pmap.name].device)
        tops.append(top_singular_value(delta.index_select(pmap.dim, rows.to(delta.device))))
    return routing, tops[0], tops[1]


def rows_drift(post: Tensor, pre: Tensor) -> Sums:
    """The sums of drift over two tensors of one shape."""
    flat, before = post.reshape(-1), pre.reshape(-1)
    moved, cross = difference_sums(flat, before).tolist()
    return Sums(moved, cross, square_sum(before))


def block_drift(param: ParamMap, pre: Tensor, post: Tensor) -> list[tuple[Block, Sums]]:
    """Sums for every block (rows of one role and head) of one parameter's compact tensors."""
    return [
        (block, rows_drift(post.narrow(param.dim, lo, hi - lo), pre.narrow(param.dim, lo, hi - lo)))
        for block, lo, hi in param.compact_blocks()
    ]


def projection_drift(
    params: Sequence[ParamMap], pre: Mapping[str, Tensor], post: Mapping[str, Tensor]
) -> dict[str, float]:
    """{q,k}_rel and {q,k}_1mcos of one layer's W_Q and W_K, from compact tensors before and after SFT.

    As in the metrics of training: all weights of a role count as one vector, biases and norms are left out, rows that
    feed both queries and keys count for both.
    """
    blocks = [pair for p in params if p.kind == "weight" for pair in block_drift(p, pre[p.name], post[p.name])]
    out: dict[str, float] = {}
    for role in "qk":
        if mine := [sums for block, sums in blocks if role in block.role]:
            total = add(mine)
            out |= {f"{role}_rel": total.rel, f"{role}_1mcos": total.one_minus_cos}
    return out
