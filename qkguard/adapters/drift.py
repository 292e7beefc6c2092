"""Drift of effective queries and keys from LoRA's factors: no dense W - W0 is formed.

With the active adapters stacked, the effective weight is W0 + diag(g) W0 + B A: g = 0 for LoRA; for DoRA with
magnitude m, c = m / |W0 + s B A| row by row, g = c - 1 and B is scaled by c (arXiv 2402.09353, equation 5).
Everything follows from three numbers per row, |w0|^2, <w0, (B A)> and |(B A)|^2, and the base weight enters only as
W0 A^T (outputs x rank), to which every rank adds what its own shard gives. All of it in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkguard.adapters.live import AdaptedWeight, Factors, replicate
from qkguard.arrays import as_tensor
from qkguard.distributed import collectives, ranks, sharding
from qkguard.drift import (
    Grams,
    LayerRouting,
    Sums,
    head_weights,
    layer_label,
    layer_metrics,
    routing_from_grams,
    routing_from_table,
    routing_metrics,
    routing_table,
    sole_weight,
    top_singular_value,
)
from qkguard.layout.selection import Selection
from qkguard.layout.spec import AttentionSpec, ParamMap

_CHUNK = 1 << 22  # elements of the base weight in float64 at once


class Moved(NamedTuple):
    """W - W0 = diag(g) W0 + b @ a of one weight, in float64; without active adapters g is 0 and the rank is 0.

    Shapes: g (outputs,), b (outputs, rank), a (rank, inputs), `projected` W0 a^T (outputs, rank), and `norms`
    (outputs,), the squared norms of W0's rows.
    """

    g: Tensor
    b: Tensor
    a: Tensor
    projected: Tensor
    norms: Tensor

    def sums(self, rows: Tensor) -> Sums:
        """The sums of drift over some rows."""
        inner, square = _row_products(self.projected, self.b, self.a)
        g, norms, inner, square = self.g[rows], self.norms[rows], inner[rows], square[rows]
        moved = (g * g * norms + 2 * g * inner + square).sum()
        return Sums(max(0.0, float(moved)), float((g * norms + inner).sum()), float(norms.sum()))


def _row_products(projected: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """<w0, (b a)> and |(b a)|^2 row by row, (outputs,) each."""
    return (projected * b).sum(1), ((b @ (a @ a.mT)) * b).sum(1)


def moved(factors: list[Factors], projected: Tensor, norms: Tensor) -> Moved:
    """Stack the active adapters of one weight, DoRA's norms applied; `projected` is W0 A^T for the stacked factors."""
    g, stacked = torch.zeros_like(norms), []
    for one, mine in zip(factors, projected.split([f.a.shape[0] for f in factors], 1), strict=True):
        b = one.b
        if one.magnitude is not None:
            inner, square = _row_products(mine, b, one.a)
            c = one.magnitude / (norms + 2 * inner + square).clamp_min(0).sqrt()
            g, b = g + c - 1, c[:, None] * b
        stacked.append(b)
    return Moved(g, torch.cat(stacked, 1), torch.cat([f.a for f in factors]), projected, norms)


def head_grams(base: Tensor, g: Tensor, b: Tensor, projected: Tensor, inner: Tensor) -> Grams:
    """Grams of one projection from base (heads, d_k, d_k), g (heads, d_k), b and W0 a^T (heads, d_k, R), a a^T."""
    cross = g[..., None] * base + b @ projected.mT
    mixed = g[..., None] * (projected @ b.mT)
    square = g[..., None] * base * g[..., None, :] + mixed + mixed.mT + b @ inner @ b.mT
    return Grams(base, cross, square)


def top_of_product(b: Tensor, a: Tensor) -> float:
    """Largest singular value of b @ a from (rank, rank) matrices."""
    values, vectors = torch.linalg.eigh(a @ a.mT)
    root = vectors * values.clamp_min(0).sqrt()
    return float(torch.linalg.eigvalsh(root.mT @ (b.mT @ b) @ root)[-1].clamp_min(0).sqrt())


class AdapterDriftMonitor:
    """Drift of a live PEFT model, its base sharded or not; ALL ranks must make one and call its methods.

    The metrics and their keys are those of `qkguard.training.drift_monitor.DriftMonitor`.
    """

    def __init__(self, model: nn.Module, selection: Selection, weights: list[AdaptedWeight]) -> None:
        self.selection, self.weights = selection, {w.pmap.name: w for w in weights}
        params = self._params(model)
        self._dtypes = {name: sharding.dtype(w.base(params[name])) for name, w in self.weights.items()}
        # a generator: of 4/8-bit weights, one at a time is dequantised
        spans = sharding.shards(w.base(params[name]) for name, w in self.weights.items())
        self._spans = dict(zip(self.weights, spans, strict=True))
        deferred = ranks.Deferred("measuring the base weights")
        norms = {}
        for name, weight in self.weights.items():
            found = deferred.run(partial(_row_norms, weight.base(params[name]), weight.pmap))
            norms[name] = _no_lines(weight.pmap) if found is None else found
        self._norms = collectives.agreed_sums(norms, deferred)
        self._grams: dict[str, tuple[Tensor, Tensor]] = {}  # W0 W0^T of the layers that this rank works out
        self._gathered = False

    @torch.no_grad()
    def measure(
        self, model: nn.Module, deferred: ranks.Deferred, *, drift: bool = True, routing: bool = False
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Drift metrics by key, and routing drift per head by layer label; ALL ranks must call this.

        With `drift`, relative drift and 1 - cos of the effective W_Q and W_K: one agreement and at most two small
        all-reduces. With `routing`, routing drift and top singular values too, the layers dealt out over the ranks.
        The base weights are gathered once for that, a layer at a time; with DoRA every time, because diag(g) W0 has
        no small factors.
        """
        state = self._state(model, deferred)
        sums = deferred.run(partial(self._sums, state)) if drift else None
        exchange = deferred.run(self._exchange) if routing else None
        deferred.agree()
        metrics = {} if sums is None else layer_metrics(self.selection, sums)
        if exchange is None:
            return metrics, {}
        layers = self._layers(model, state, exchange, deferred)
        total = collectives.agreed_sums({"routing": as_tensor(routing_table(self.selection, layers))}, deferred)
        self._gathered = True
        found, heads = routing_metrics(self.selection, routing_from_table(self.selection, total["routing"]))
        return metrics | found, heads

    def _sums(self, state: Mapping[str, Moved]) -> dict[tuple[str, str], Sums]:
        """The sums of drift by weight and role."""
        sums: dict[tuple[str, str], Sums] = {}
        for name, now in state.items():
            pmap = self.weights[name].pmap
            for role in sorted({block.role for block in pmap.blocks}):
                rows = [torch.arange(block.start, block.stop) for block in pmap.blocks if block.role == role]
                sums[name, role] = now.sums(torch.cat(rows))
        return sums

    def _exchange(self) -> collectives.Exchange:
        """Memory for gathering any base weight."""
        return collectives.Exchange.of((self._spans[name], self._dtypes[name]) for name in self.weights)

    def _layers(
        self, model: nn.Module, state: Mapping[str, Moved], exchange: collectives.Exchange, deferred: ranks.Deferred
    ) -> dict[str, LayerRouting]:
        """Routing of the layers that fall to this rank, by label; ALL ranks must call this."""
        params = self._params(model)
        mine: dict[str, LayerRouting] = {}
        for i, (spec, maps) in enumerate(self.selection):
            owner = i % ranks.world_size()
            weights = [self.weights[p.name] for p in maps if p.kind == "weight"]
            gathered: dict[str, Tensor | None] = {}
            for weight in weights:
                if weight.dora or not self._gathered:
                    base = weight.base(params[weight.pmap.name])
                    gathered[weight.pmap.name] = self._gather(base, weight.pmap, owner, exchange, deferred)
            if owner == ranks.rank():
                base = {name: full for name, full in gathered.items() if full is not None}
                measure = partial(self._layer, layer_label(i, self.selection), spec, maps, state, base)
                layer = deferred.run(measure)
                if layer is not None:
                    mine[layer_label(i, self.selection)] = layer
        return mine

    def _layer(
        self,
        label: str,
        spec: AttentionSpec,
        maps: Sequence[ParamMap],
        state: Mapping[str, Moved],
        base: Mapping[str, Tensor],
    ) -> LayerRouting:
        """One layer's routing; `base` holds the compact base weights that this needs."""
        pair = None if self._gathered else head_weights(spec, maps, base)
        if pair is not None:
            self._grams[label] = (pair[0] @ pair[0].mT, pair[1] @ pair[1].mT)
        routing = _layer_routing(spec, maps, state, self._grams[label]) if label in self._grams else []
        return LayerRouting(routing, *(self._top(role, maps, state, base) for role in "qk"))

    def _gather(
        self, param: Any, pmap: ParamMap, dst: int, exchange: collectives.Exchange, deferred: ranks.Deferred
    ) -> Tensor | None:
        """The compact base weight in float64 on rank `dst`, None elsewhere; ALL ranks must call this."""
        spans = self._spans[pmap.name]
        mine = deferred.run(partial(sharding.read, param, spans[ranks.rank()]))
        flat = exchange.gather(mine, spans, self._dtypes[pmap.name], deferred, dst)
        return None if flat is None else deferred.run(partial(_compact, flat, pmap))

    def _top(
        self, role: str, maps: Sequence[ParamMap], state: Mapping[str, Moved], base: Mapping[str, Tensor]
    ) -> float | None:
        """The largest singular value of what a layer's queries or keys have moved by."""
        found = sole_weight(maps, role)
        if found is None:
            return None
        pmap, selected = found[0], torch.from_numpy(found[1])
        now = state[pmap.name]
        if not len(now.a):
            return 0.0
        rows = _compact_rows(pmap)[selected]
        if not self.weights[pmap.name].dora:
            return top_of_product(now.b[rows], now.a)
        compact = base[pmap.name] if pmap.dim == 0 else base[pmap.name].mT
        return top_singular_value(now.g[rows, None] * compact[selected] + now.b[rows] @ now.a)

    def _params(self, model: nn.Module) -> dict[str, Any]:
        live = dict(sharding.unwrap(model).named_parameters())
        return {name: live[name] for name in self.weights}

    def _state(self, model: nn.Module, deferred: ranks.Deferred) -> dict[str, Moved]:
        """What every query and key weight has moved by, alike on all ranks; ALL ranks must call this.

        Of no use where something has failed, which `deferred` keeps.
        """
        params = self._params(model)
        adapter_params = {name: weight.params() for name, weight in self.weights.items()}
        full = iter(replicate([param for own in adapter_params.values() for param in own]))
        factors: dict[str, list[Factors]] = {}
        local: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            factors[name] = weight.factors([next(full) for _ in adapter_params[name]])
            if factors[name]:
                a = torch.cat([one.a for one in factors[name]])
                found = deferred.run(partial(_project, weight.base(params[name]), weight.pmap, a))
                local[name] = _no_lines(weight.pmap, (len(a),)) if found is None else found
        projected = collectives.agreed_sums(local, deferred) if local else {}
        state = {}
        for name, weight in self.weights.items():
            norms = self._norms[name]
            if factors[name]:
                state[name] = moved(factors[name], projected[name], norms)
            else:
                none = norms.new_zeros(len(norms), 0)
                state[name] = Moved(torch.zeros_like(norms), none, norms.new_zeros(0, weight.inputs), none, norms)
        return state


def _layer_routing(
    spec: AttentionSpec, maps: Sequence[ParamMap], state: Mapping[str, Moved], base: tuple[Tensor, Tensor]
) -> list[float]:
    """Routing drift per query head; `base` holds W0 W0^T of the queries and of the keys, head by head."""
    weights = [p for p in maps if p.kind == "weight"]
    rank = max(len(state[p.name].a) for p in weights)
    if not rank:
        return [0.0] * spec.num_heads
    columns: dict[str, dict[str, Tensor]] = {"g": {}, "b": {}, "projected": {}}
    inner: dict[str, Tensor] = {}
    for pmap in weights:
        now, rows = state[pmap.name], _compact_rows(pmap)
        missing = rank - len(now.a)  # queries and keys of one rank, so that `head_weights` reads both alike
        parts = {
            "g": now.g[rows, None],
            "b": nn.functional.pad(now.b[rows], (0, missing)),
            "projected": nn.functional.pad(now.projected[rows], (0, missing)),
        }
        for key, value in parts.items():
            columns[key][pmap.name] = value if pmap.dim == 0 else value.mT
        gram = nn.functional.pad(now.a @ now.a.mT, (0, missing, 0, missing))
        for role in {block.role for block in pmap.blocks}:
            inner |= dict.fromkeys(role, gram)
    stacked = {key: head_weights(spec, maps, compact) for key, compact in columns.items()}
    g, b, projected = stacked["g"], stacked["b"], stacked["projected"]
    assert g and b and projected  # as the base weights, which have the same rows
    q, k = (head_grams(base[i], g[i][..., 0], b[i], projected[i], inner[role]) for i, role in enumerate("qk"))
    return routing_from_grams(q, k).tolist()


def _compact_rows(pmap: ParamMap) -> Tensor:
    """The output rows that a compact tensor holds, in its order."""
    return torch.cat([torch.arange(lo, hi) for lo, hi in pmap.ranges])


# -- from shards ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _row_norms(param: Any, pmap: ParamMap) -> Tensor:
    """This rank's share of |w0|^2 for every output row."""
    out = _no_lines(pmap)
    for row, block in _blocks(param, pmap):
        if pmap.dim == 0:
            out[row : row + len(block)] = (block * block).sum(1).cpu()
        else:
            out += (block * block).sum(0).cpu()
    return out


def _project(param: Any, pmap: ParamMap, a: Tensor) -> Tensor:
    """This rank's share of W0 a^T, (outputs, rank): its shard of the base weight in whole lines, zeros outside it."""
    out = _no_lines(pmap, (len(a),))
    for row, block in _blocks(param, pmap):
        side = a.to(block.device)
        if pmap.dim == 0:
            out[row : row + len(block)] = (block @ side.mT).cpu()
        else:
            out += (block.mT @ side[:, row : row + len(block)].mT).cpu()
    return out


def _blocks(param: Any, pmap: ParamMap) -> Iterator[tuple[int, Tensor]]:
    """(first line, lines in float64) of this rank's shard of a matrix, some lines at a time; zeros outside it."""
    width = pmap.shape[1]
    start, stop = sharding.shard_span(param)
    lines = max(1, _CHUNK // width)
    for first in range(start // width, -(-stop // width), lines):
        last = min(first + lines, -(-stop // width))
        lo, hi = max(start, first * width), min(stop, last * width)
        flat = sharding.read(param, (lo, hi))
        block = torch.zeros((last - first) * width, dtype=torch.float64, device=flat.device)
        block[lo - first * width : hi - first * width] = flat
        yield first, block.view(last - first, width)


def _no_lines(pmap: ParamMap, columns: tuple[int, ...] = ()) -> Tensor:
    """What a rank with no part of a weight, or one that failed, adds to its outputs."""
    return torch.zeros(pmap.shape[pmap.dim], *columns, dtype=torch.float64)


def _compact(flat: Tensor, pmap: ParamMap) -> Tensor:
    """The compact rows of a gathered weight, in float64 on the CPU."""
    return pmap.take(flat.view(pmap.shape)).double().cpu()
