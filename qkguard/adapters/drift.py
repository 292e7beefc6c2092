"""Drift of effective queries and keys from LoRA's factors: no dense W - W0 is formed.

With the active adapters stacked, the effective weight is W0 + diag(g) W0 + B A: g = 0 for LoRA; for DoRA with
magnitude m, c = m / |W0 + s B A| row by row, g = c - 1 and B is scaled by c (arXiv 2402.09353, equation 5).
Everything follows from three numbers per row, |w0|^2, <w0, (B A)> and |(B A)|^2, and the base weight enters only as
W0 A^T (outputs x rank), to which every rank adds what its own shard gives. All of it in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkguard.adapters.live import AdaptedWeight, Factors, replicate
from qkguard.distributed import collectives, ranks, sharding
from qkguard.drift import (
    LayerRouting,
    Sums,
    head_weights,
    layer_label,
    layer_metrics,
    routing_metrics,
    top_singular_value,
)
from qkguard.layout.selection import Selection
from qkguard.layout.spec import ParamMap

_CHUNK = 1 << 22  # elements of the base weight in float64 at once


class Moved(NamedTuple):
    """W - W0 = diag(g) W0 + b @ a of one weight; `projected` is W0 a^T, `norms` the squared norms of W0's rows."""

    g: Tensor
    b: Tensor
    a: Tensor
    projected: Tensor
    norms: Tensor

    def sums(self, rows: Tensor) -> Sums:
        """The sums of drift over some rows."""
        g, norms = self.g[rows], self.norms[rows]
        inner, square = self._inner()[rows], self._square()[rows]
        moved = (g * g * norms + 2 * g * inner + square).sum()
        return Sums(max(0.0, float(moved)), float((g * norms + inner).sum()), float(norms.sum()))

    def _inner(self) -> Tensor:
        return (self.projected * self.b).sum(1)

    def _square(self) -> Tensor:
        return ((self.b @ (self.a @ self.a.mT)) * self.b).sum(1)


def moved(factors: list[Factors], projected: Tensor, norms: Tensor) -> Moved:
    """Stack the active adapters of one weight, DoRA's norms applied; `projected` is W0 A^T for the stacked factors."""
    g, parts = torch.zeros_like(norms), []
    for one, mine in zip(factors, projected.split([f.a.shape[0] for f in factors], 1), strict=True):
        b = one.b
        if one.magnitude is not None:
            inner, square = (mine * b).sum(1), ((b @ (one.a @ one.a.mT)) * b).sum(1)
            c = one.magnitude / (norms + 2 * inner + square).clamp_min(0).sqrt()
            g, b = g + c - 1, c[:, None] * b
        parts.append(b)
    return Moved(g, torch.cat(parts, 1), torch.cat([f.a for f in factors]), projected, norms)


class Grams(NamedTuple):
    """Per head, (heads, d_k, d_k): W0 W0^T, (W - W0) W0^T and (W - W0) (W - W0)^T."""

    base: Tensor
    cross: Tensor
    moved: Tensor


def head_grams(base: Tensor, g: Tensor, b: Tensor, projected: Tensor, inner: Tensor) -> Grams:
    """Grams of one projection from base (heads, d_k, d_k), g (heads, d_k), b and W0 a^T (heads, d_k, R), a a^T."""
    cross = g[..., None] * base + b @ projected.mT
    mixed = g[..., None] * (projected @ b.mT)
    square = g[..., None] * base * g[..., None, :] + mixed + mixed.mT + b @ inner @ b.mT
    return Grams(base, cross, square)


def routing_from_grams(q: Grams, k: Grams) -> Tensor:
    """|R - R0| / |R0| per query head; the formula of `qkguard.drift.routing_drift` with the products given."""
    group = q.base.shape[0] // k.base.shape[0]

    def traced(a: Tensor, b: Tensor) -> Tensor:
        return (a * b.repeat_interleave(group, 0).mT).sum((-1, -2))

    now = k.base + k.cross + k.cross.mT + k.moved
    difference = traced(q.moved, now) + traced(q.base, k.moved) + 2 * traced(q.cross, k.cross + k.moved)
    return (difference.clamp_min(0) / traced(q.base, k.base)).sqrt()


def top_of_product(b: Tensor, a: Tensor) -> float:
    """Largest singular value of b @ a from (rank, rank) matrices."""
    values, vectors = torch.linalg.eigh(a @ a.mT)
    root = vectors * values.clamp_min(0).sqrt()
    return float(torch.linalg.eigvalsh(root.mT @ (b.mT @ b) @ root)[-1].clamp_min(0).sqrt())


class AdapterDriftMonitor:
    """Drift of a live PEFT model; the metrics and their keys are `qkguard.training.drift_monitor.DriftMonitor`'s."""

    def __init__(self, model: nn.Module, selection: Selection, weights: list[AdaptedWeight]) -> None:
        self.selection, self.weights = selection, {w.pmap.name: w for w in weights}
        params = self._params(model)
        self._norms = dict(
            zip(
                self.weights,
                self._reduced([self._row_norms(params[n], w) for n, w in self.weights.items()]),
                strict=True,
            )
        )
        self._grams: dict[str, tuple[Tensor, Tensor]] = {}  # of the layers that this rank works out
        self._gathered = False

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Relative drift and 1 - cos of the effective W_Q and W_K; two small all-reduces (ALL ranks)."""
        state = self._state(model)
        sums: dict[tuple[str, str], Sums] = {}
        for name, weight in self.weights.items():
            for role in sorted({block.role for block in weight.pmap.blocks}):
                rows = _rows(weight.pmap, role)
                if name in state:
                    sums[name, role] = state[name].sums(rows)
                else:
                    sums[name, role] = Sums(0.0, 0.0, float(self._norms[name][rows].sum()))
        return layer_metrics(self.selection, sums)

    def measure_routing(self, model: nn.Module) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Routing drift and top singular values, the layers dealt out over the ranks; ALL ranks must take part.

        The base weights are gathered once, a layer at a time, for the products of their rows; with DoRA every time,
        because diag(g) W0 has no small factors.
        """
        me, size = ranks.rank(), ranks.world_size()
        params, state = self._params(model), self._state(model)
        mine: dict[str, LayerRouting] = {}
        first = not self._gathered
        for i, (spec, maps) in enumerate(self.selection):
            label = layer_label(i, self.selection)
            weights = [self.weights[p.name] for p in maps if p.kind == "weight"]
            base: dict[str, Tensor] = {}
            for weight in weights:
                if first or weight.dora:
                    full = _gather(weight.base(params[weight.pmap.name]), weight.pmap, i % size)
                    if full is not None:
                        base[weight.pmap.name] = full
            if i % size != me:
                continue
            if first and (pair := head_weights(spec, maps, base)):
                self._grams[label] = (pair[0] @ pair[0].mT, pair[1] @ pair[1].mT)
            routing = self._routing(i, state) if label in self._grams else []
            tops = [self._top(role, maps, state, base) for role in "qk"]
            mine[label] = LayerRouting(routing, *tops)
        self._gathered = True
        parts = ranks.agree("measuring routing drift", lambda: mine)
        return routing_metrics(self.selection, {k: v for part in parts for k, v in part.items()})

    def _routing(self, index: int, state: dict[str, Moved]) -> list[float]:
        spec, maps = self.selection[index]
        weights = [p for p in maps if p.kind == "weight"]
        rank = max([state[p.name].a.shape[0] for p in weights if p.name in state], default=0)
        if not rank:
            return [0.0] * spec.num_heads
        columns: dict[str, dict[str, Tensor]] = {"g": {}, "b": {}, "projected": {}}
        inner: dict[str, Tensor] = {}
        for pmap in weights:
            now = state.get(pmap.name)
            rows = torch.cat([torch.arange(lo, hi) for lo, hi in pmap.ranges])
            zeros = torch.zeros(len(rows), rank, dtype=torch.float64)
            gram = torch.zeros(rank, rank, dtype=torch.float64)
            parts = {"g": zeros[:, :1], "b": zeros, "projected": zeros}
            if now is not None:
                held = now.a.shape[0]
                pad = (0, rank - held)
                gram[:held, :held] = now.a @ now.a.mT
                parts = {
                    "g": now.g[rows, None],
                    "b": _pad(now.b[rows], pad),
                    "projected": _pad(now.projected[rows], pad),
                }
            for key, value in parts.items():
                columns[key][pmap.name] = value if pmap.dim == 0 else value.mT
            for role in {block.role for block in pmap.blocks}:
                inner |= dict.fromkeys(role, gram)
        stacked = {key: head_weights(spec, maps, compact) for key, compact in columns.items()}
        g, b, projected = stacked["g"], stacked["b"], stacked["projected"]
        assert g and b and projected  # as the base weights, which have the same rows
        label = layer_label(index, self.selection)
        grams = [
            head_grams(self._grams[label][i], g[i][..., 0], b[i], projected[i], inner[role])
            for i, role in enumerate("qk")
        ]
        return routing_from_grams(grams[0], grams[1]).tolist()

    def _top(self, role: str, maps: Any, state: dict[str, Moved], base: dict[str, Tensor]) -> float | None:
        owners = [p for p in maps if p.kind == "weight" and any(role in b.role for b in p.blocks)]
        if len(owners) != 1:
            return None
        pmap = owners[0]
        if pmap.name not in state:
            return 0.0
        now, rows = state[pmap.name], _rows(pmap, role, within=True)
        if not self.weights[pmap.name].dora:
            return top_of_product(now.b[rows], now.a)
        compact = base[pmap.name] if pmap.dim == 0 else base[pmap.name].mT
        selected = torch.cat([torch.arange(lo, hi) for b, lo, hi in pmap.compact_blocks() if role in b.role])
        return top_singular_value(now.g[rows, None] * compact[selected] + now.b[rows] @ now.a)

    # -- from shards -------------------------------------------------------------------------------------------------

    def _params(self, model: nn.Module) -> dict[str, Any]:
        live = dict(sharding.unwrap(model).named_parameters())
        return {name: live[name] for name in self.weights}

    @torch.no_grad()
    def _state(self, model: nn.Module) -> dict[str, Moved]:
        """What every adapted weight has moved by, on all ranks alike."""
        adapted = {n: w for n, w in self.weights.items() if w.adapters}
        if not adapted:
            return {}
        params = self._params(model)
        tensors = [w.params() for w in adapted.values()]
        full = iter(replicate([p for group in tensors for p in group]))
        factors = {
            n: w.factors([next(full) for _ in group]) for (n, w), group in zip(adapted.items(), tensors, strict=True)
        }
        local = [_project(w.base(params[n]), w.pmap, torch.cat([f.a for f in factors[n]])) for n, w in adapted.items()]
        projected = self._reduced(local)
        return {n: moved(factors[n], p, self._norms[n]) for n, p in zip(adapted, projected, strict=True)}

    @torch.no_grad()
    def _row_norms(self, param: Any, weight: AdaptedWeight) -> Tensor:
        out = torch.zeros(weight.outputs, dtype=torch.float64)
        for row, block in _blocks(weight.base(param), weight.pmap):
            if weight.pmap.dim == 0:
                out[row : row + len(block)] = (block * block).sum(1).cpu()
            else:
                out += (block * block).sum(0).cpu()
        return out

    @staticmethod
    def _reduced(parts: list[Tensor]) -> list[Tensor]:
        """Sum over the ranks of every tensor, in one all-reduce."""
        joined = collectives.all_reduce_sum(torch.cat([part.reshape(-1) for part in parts]))
        return [
            flat.view(part.shape) for flat, part in zip(joined.split([p.numel() for p in parts]), parts, strict=True)
        ]


def _project(param: Any, pmap: ParamMap, a: Tensor) -> Tensor:
    """This rank's share of W0 a^T, (outputs, rank): its tile of the base weight in whole lines, zeros outside it."""
    out = torch.zeros(pmap.shape[pmap.dim], a.shape[0], dtype=torch.float64)
    for row, block in _blocks(param, pmap):
        side = a.to(block.device)
        if pmap.dim == 0:
            out[row : row + len(block)] = (block @ side.mT).cpu()
        else:
            out += (block.mT @ side[:, row : row + len(block)].mT).cpu()
    return out


def _blocks(param: Any, pmap: ParamMap) -> Any:
    """(first line, lines in float64) of this rank's tile of a matrix, some lines at a time, zero where not its own."""
    width = pmap.shape[1]
    start, stop = sharding.shard_span(param)
    lines = max(1, _CHUNK // width)
    for first in range(start // width, -(-stop // width), lines):
        last = min(first + lines, -(-stop // width))
        lo, hi = max(start, first * width), min(stop, last * width)
        piece = sharding.read(param, (lo, hi))
        block = torch.zeros((last - first) * width, dtype=torch.float64, device=piece.device)
        block[lo - first * width : hi - first * width] = piece
        yield first, block.view(last - first, width)


def _gather(param: Any, pmap: ParamMap, dst: int) -> Tensor | None:
    """The compact base weight in float64 on rank `dst`, None elsewhere; a collective."""
    spans = sharding.shards([param])[0]
    flat = collectives.gather_flat(sharding.read(param, spans[ranks.rank()]), spans, dst)
    return None if flat is None else pmap.take(flat.view(pmap.shape)).double().cpu()


def _rows(pmap: ParamMap, role: str, *, within: bool = False) -> Tensor:
    """Output rows of one role; with `within` of every role that the letter is part of."""
    return torch.cat(
        [torch.arange(b.start, b.stop) for b in pmap.blocks if (role in b.role if within else role == b.role)]
    )


def _pad(tensor: Tensor, pad: tuple[int, int]) -> Tensor:
    return nn.functional.pad(tensor, pad)
