"""Drift of the queries and keys of a model in full-parameter training, from the part that each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

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
    launch_sums,
    layer_label,
    layer_metrics,
    layer_routing,
    routing_from_table,
    routing_metrics,
    routing_table,
    row_counts,
    square_sum,
)
from qkguard.layout.spec import ParamMap
from qkguard.training.side_stream import SideStream


class Started(NamedTuple):
    """A measurement that has begun: of each row of sums the number of weight and role, and the rows, (n, 2) together,
    where the weights are."""

    keys: Tensor
    sums: list[Tensor]


class DriftMonitor:
    """Measures how far a live, possibly sharded model has moved from its reference; ALL ranks must call its methods.

    For adapters, `qkguard.adapters.drift.AdapterDriftMonitor` gives the same metrics.

    Attributes:
        side: where an accelerator works out the sums of drift; wait for it before the weights change.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference, self.selection = reference, reference.selection
        self.side = SideStream()
        reference.readers.append(self.side.wait)
        self._role_slices = {name: pmap.role_slices(*reference.spans[name]) for name, pmap in reference.maps.items()}
        self._keys = [(name, role) for name, pmap in reference.maps.items() for role in _roles(pmap)]
        self._base_sums = {key: self._base_sum(*key) for key in self._keys}  # |W0|^2 of this rank's rows

    def _base_sum(self, name: str, role: str) -> float:
        kept = self.reference.slices[name]
        return sum(square_sum(kept[rows.compact]) for rows in self._role_slices[name] if rows.role == role)

    def measure(
        self, model: nn.Module, deferred: ranks.Deferred, *, drift: bool = True, routing: bool = False
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Drift metrics by key, and routing drift per head by layer label; ALL ranks must call this.

        With `drift`, relative drift and 1 - cos of W_Q and W_K, per layer and over layers: one agreement and one
        small all-reduce. With `routing`, routing drift and top singular values too: the weights are gathered a layer
        at a time, and the layers are dealt out over the ranks.
        """
        started = deferred.run(partial(self.start, model)) if drift else None
        gathering = deferred.run(partial(self._ready_to_gather, model)) if routing else None
        return self._finish(started, gathering, deferred)

    @torch.no_grad()
    def start(self, model: nn.Module) -> Started:
        """Begin to measure the weights as they are now, where they lie; every rank by itself. `finish` reads it."""
        params = self.reference.params(model)
        return self.side.run(partial(self._difference_sums, params))

    def finish(self, started: Started | None, deferred: ranks.Deferred) -> dict[str, float]:
        """The metrics of what `start` began, None on a rank where that failed; ALL ranks must call this."""
        return self._finish(started, None, deferred)[0]

    def _ready_to_gather(self, model: nn.Module) -> tuple[dict[str, Param], collectives.Exchange]:
        return self.reference.params(model), self.reference.exchange()

    @torch.no_grad()
    def _finish(
        self,
        started: Started | None,
        gathering: tuple[dict[str, Param], collectives.Exchange] | None,
        deferred: ranks.Deferred,
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        with self.side.stream():  # here and below not behind the training's own work
            sums = None if started is None else deferred.run(partial(self._sums, started))
        deferred.agree()
        parts: dict[str, Tensor] = {} if sums is None else {"sums": sums}
        if gathering is not None:
            layers = self._layer_routing(*gathering, deferred)
            parts["routing"] = as_tensor(routing_table(self.selection, layers))
        with self.side.stream():
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

    def _difference_sums(self, params: dict[str, Param]) -> Started:
        keys: list[int] = []
        pieces: list[tuple[Tensor, Tensor]] = []
        for i, (name, role) in enumerate(self._keys):
            live, kept = self.reference.live(params, name), self.reference.slices[name]
            for rows in self._role_slices[name]:
                if rows.role == role:
                    keys.append(i)
                    pieces.append((live[rows.flat], kept[rows.compact]))
        numbers = torch.tensor(keys, dtype=torch.int64)
        if not _on_accelerator(pieces):
            return Started(numbers, [difference_sums(live, pre)[None] for live, pre in pieces])
        counts = torch.tensor(row_counts(len(live) for live, _ in pieces))
        return Started(numbers.repeat_interleave(counts), launch_sums(pieces))

    def _sums(self, started: Started) -> Tensor:
        """This rank's part of the sums of drift, (weights and roles, 3) in float64, once they are there."""
        sums = torch.zeros(len(self._keys), 3, dtype=torch.float64)
        sums[:, 2] = torch.tensor([self._base_sums[key] for key in self._keys], dtype=torch.float64)
        if started.sums:
            rows = torch.cat([rows.cpu() for rows in started.sums]).double()
            sums[:, :2].index_add_(0, started.keys, rows)
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


def _on_accelerator(pieces: Sequence[tuple[Tensor, Tensor]]) -> bool:
    return any(live.device.type != "cpu" for live, _ in pieces)
