"""Drift of a model in training, from the pieces each rank holds."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from qkguard.distributed import collectives, ranks
from qkguard.distributed.reference import Reference
from qkguard.drift import (
    LayerRouting,
    Sums,
    difference_sums,
    layer_label,
    layer_metrics,
    layer_routing,
    routing_metrics,
    square_sum,
)
from qkguard.layout.selection import Selection


class Tracker(Protocol):
    """Drift of a live model; ALL ranks take part."""

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Metrics that need no gathering, by key."""
        ...

    def measure_routing(self, model: nn.Module) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Routing drift and top singular values by key, and per-head routing drift by layer label."""
        ...


class DriftMonitor:
    """Drift of a live, possibly sharded model against its reference."""

    def __init__(self, reference: Reference, selection: Selection) -> None:
        self.reference, self.selection = reference, selection
        self._slices = {name: pmap.role_slices(*reference.spans[name]) for name, pmap in reference.maps.items()}
        self._keys = [(n, role) for n, m in reference.maps.items() for role in sorted({b.role for b in m.blocks})]
        self._base = {
            key: sum(square_sum(reference.slices[key[0]][r.compact]) for r in self._slices[key[0]] if r.role == key[1])
            for key in self._keys
        }

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Relative drift and 1 - cos of W_Q and W_K, per layer and over layers; one small all-reduce (ALL ranks)."""
        params = self.reference.params(model)
        local = torch.zeros(len(self._keys), 3, dtype=torch.float64)
        parts: list[tuple[int, Tensor]] = []  # read back once, so that an accelerator is not synchronised per tensor
        for i, (name, role) in enumerate(self._keys):
            live = self.reference.live(params, name)
            local[i, 2] = self._base[name, role]
            for part in self._slices[name]:
                if part.role == role:
                    parts.append((i, difference_sums(live[part.flat], self.reference.slices[name][part.compact])))
        for i, pair in parts:
            local[i, :2] += pair.cpu()
        table = collectives.all_reduce_sum(local).tolist()
        return layer_metrics(self.selection, {k: Sums(*row) for k, row in zip(self._keys, table, strict=True)})

    @torch.no_grad()
    def measure_routing(self, model: nn.Module) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Routing drift and top singular values, gathered a layer at a time, the layers dealt out over the ranks.

        ALL ranks must take part. Returns scalar metrics by key, and per-head routing drift by layer label.
        """
        me, size = ranks.rank(), ranks.world_size()
        mine: dict[str, LayerRouting] = {}
        for i, (spec, maps) in enumerate(self.selection):
            pairs = {p.name: self.reference.gather(model, p.name, dst=i % size) for p in maps if p.kind == "weight"}
            if i % size == me:
                pre = {n: pair[0] for n, pair in pairs.items() if pair}
                live = {n: pair[1] for n, pair in pairs.items() if pair}
                mine[layer_label(i, self.selection)] = layer_routing(spec, maps, pre, live)
        parts = ranks.agree("measuring routing drift", lambda: mine)
        return routing_metrics(self.selection, {k: v for part in parts for k, v in part.items()})
