"""Drift of the queries and keys of a model in full-parameter training, from the part that each rank holds."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from qkguard.arrays import as_tensor
from qkguard.distributed import collectives, ranks
from qkguard.distributed.reference import Reference
from qkguard.distributed.sharding import Param
from qkguard.drift import (
    LayerRouting,
    Sums,
    difference_sums,
    layer_label,
    layer_metrics,
    layer_routing,
    routing_from_table,
    routing_metrics,
    routing_table,
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
    def measure(
        self, model: nn.Module, deferred: ranks.Deferred, *, drift: bool = True, routing: bool = False
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Drift metrics by key, and routing drift per head by layer label; ALL ranks must call this.

        With `drift`, relative drift and 1 - cos of W_Q and W_K, per layer and over layers: one agreement and one
        small all-reduce. With `routing`, routing drift and top singular values too: the weights are gathered a layer
        at a time, and the layers are dealt out over the ranks.
        """
        parts: dict[str, Tensor] = {}
        params = deferred.run(partial(self.reference.params, model))
        sums = deferred.run(partial(self._sums, params)) if drift and params is not None else None
        exchange = deferred.run(self.reference.exchange) if routing else None
        deferred.agree()
        if sums is not None:
            parts["sums"] = sums
        if exchange is not None and params is not None:
            layers = self._layer_routing(params, exchange, deferred)
            parts["routing"] = as_tensor(routing_table(self.selection, layers))
        total = collectives.agreed_sums(parts, deferred)
        metrics: dict[str, float] = {}
        heads: dict[str, list[float]] = {}
        if "sums" in total:
            table = zip(self._keys, total["sums"].tolist(), strict=True)
            metrics |= layer_metrics(self.selection, {key: Sums(*row) for key, row in table})
        if "routing" in total:
            found, heads = routing_metrics(self.selection, routing_from_table(self.selection, total["routing"]))
            metrics |= found
        return metrics, heads

    def _sums(self, params: dict[str, Param]) -> Tensor:
        """This rank's part of the sums of drift, (weights and roles, 3)."""
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
        return sums

    def _layer_routing(
        self, params: dict[str, Param], exchange: collectives.Exchange, deferred: ranks.Deferred
    ) -> dict[str, LayerRouting]:
        """Routing of the layers that fall to this rank, by label; ALL ranks must call this."""
        mine = {}
        for i, (spec, maps) in enumerate(self.selection):
            owner = i % ranks.world_size()
            weights = [p.name for p in maps if p.kind == "weight"]
            gathered = {name: self.reference.gather(params, name, exchange, deferred, owner) for name in weights}
            pairs = {name: pair for name, pair in gathered.items() if pair is not None}
            if owner == ranks.rank() and len(pairs) == len(weights):
                pre = {name: pair[0] for name, pair in pairs.items()}
                live = {name: pair[1] for name, pair in pairs.items()}
                layer = deferred.run(partial(layer_routing, spec, maps, pre, live))
                if layer is not None:
                    mine[layer_label(i, self.selection)] = layer
        return mine


def _roles(pmap: ParamMap) -> list[str]:
    """The roles ("q", "k", "kv", ...) that a parameter's rows have."""
    return sorted({block.role for block in pmap.blocks})
