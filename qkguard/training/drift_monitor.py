"""Drift of the queries and keys of a model in full-parameter training, from the part that each rank holds."""

from __future__ import annotations

from collections import ChainMap

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
from qkguard.layout.spec import ParamMap


class DriftMonitor:
    """Measures how far a live, possibly sharded model has moved from its reference; ALL ranks must call its methods.

    For adapters, `qkguard.adapters.drift.AdapterDriftMonitor` gives the same metrics.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference, self.selection = reference, reference.selection
        self._role_slices = {name: pmap.role_slices(*reference.spans[name]) for name, pmap in reference.maps.items()}
        self._keys = [(name, role) for name, pmap in reference.maps.items() for role in _roles(pmap)]
        self._base_sums = {key: self._base_sum(*key) for key in self._keys}  # |W0|^2 of this rank's rows

    def _base_sum(self, name: str, role: str) -> float:
        kept = self.reference.slices[name]
        return sum(square_sum(kept[rows.compact]) for rows in self._role_slices[name] if rows.role == role)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Relative drift and 1 - cos of W_Q and W_K, per layer and over layers; one small all-reduce (ALL ranks)."""
        params = self.reference.params(model)
        sums = torch.zeros(len(self._keys), 3, dtype=torch.float64)
        on_device: list[tuple[int, Tensor]] = []  # read back at the end: an accelerator is synchronised only once
        for i, (name, role) in enumerate(self._keys):
            live, kept = self.reference.live(params, name), self.reference.slices[name]
            sums[i, 2] = self._base_sums[name, role]
            for rows in self._role_slices[name]:
                if rows.role == role:
                    on_device.append((i, difference_sums(live[rows.flat], kept[rows.compact])))
        for i, pair in on_device:
            sums[i, :2] += pair.cpu()
        table = collectives.all_reduce_sum(sums).tolist()
        return layer_metrics(self.selection, {k: Sums(*row) for k, row in zip(self._keys, table, strict=True)})

    @torch.no_grad()
    def measure_routing(self, model: nn.Module) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Routing drift and top singular values; ALL ranks must call this.

        The weights are gathered a layer at a time, and the layers are dealt out over the ranks. Returns metrics by
        key, and routing drift per head by layer label.
        """
        size = ranks.world_size()
        mine: dict[str, LayerRouting] = {}
        for i, (spec, maps) in enumerate(self.selection):
            weights = [p.name for p in maps if p.kind == "weight"]
            gathered = {name: self.reference.gather(model, name, dst=i % size) for name in weights}
            pairs = {name: pair for name, pair in gathered.items() if pair is not None}
            if i % size == ranks.rank():
                pre = {name: pair[0] for name, pair in pairs.items()}
                live = {name: pair[1] for name, pair in pairs.items()}
                mine[layer_label(i, self.selection)] = layer_routing(spec, maps, pre, live)
        layers = ChainMap(*ranks.agree("measuring routing drift", mine.copy))
        return routing_metrics(self.selection, layers)


def _roles(pmap: ParamMap) -> list[str]:
    """The roles ("q", "k", "kv", ...) that a parameter's rows have."""
    return sorted({block.role for block in pmap.blocks})
