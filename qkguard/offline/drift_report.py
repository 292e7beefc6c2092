"""Drift between two checkpoints on disk, layer by layer: the metrics of training, without a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from qkguard.arrays import cast
from qkguard.drift import Sums, add, block_drift, largest, layer_routing, projection_drift
from qkguard.layout.rows import RowOptions, RowSelection
from qkguard.layout.spec import AttentionSpec, ParamMap
from qkguard.offline.pair import find_pair, open_folders


def drift_report(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    routing: bool = True,
    progress: Callable[[int, int], None] | None = None,
    spec: Any = None,
    trust_remote_code: bool = False,
    **rows: Unpack[RowOptions],
) -> dict[str, Any]:
    """How far the queries and keys of one checkpoint are from another's, per tensor, layer and head.

    Args:
        base: a folder or hub id, read in the tuned checkpoint's dtype, so 0 means that a restore would change nothing.
        tuned: a folder or hub id.
        routing: also report routing drift per head and the top singular values of W - W0. These float64 products
            take most of the time.
        progress: called with the number of layers done and of all layers.
        spec: as in `restore_checkpoint`.
        trust_remote_code: likewise.
        rows: likewise.

    Returns:
        {"base", "tuned", "layers": [...], "mean": {...}, "max": {...}, "warnings"}. A layer has its drift under the
        metric names of training (q_rel, k_rel, q_1mcos, k_1mcos, routing_rel, q_top_sv, k_top_sv), routing_per_head,
        and for each tensor rel, 1mcos and rel_per_head. Takes the memory of one layer's rows, in float64 with
        `routing`.

    Raises:
        QKGuardError: as `restore_checkpoint`.
    """
    folders = open_folders(base, tuned)
    pair = find_pair(folders, rows=RowSelection.of(rows), spec=spec, trust_remote_code=trust_remote_code)
    layers = []
    for done, (spec, params) in enumerate(pair.selection, 1):
        post = {p.name: pair.weights.read(pair.names[p.name], p) for p in params}
        pre = {p.name: cast(pair.base.get(p), post[p.name].dtype) for p in params}
        layer: dict[str, Any] = {"layer": spec.layer, "module": spec.module, "kind": spec.kind}
        layer["drift"] = projection_drift(params, pre, post)
        if routing:
            _add_routing(layer, spec, params, pre, post)
        layer["tensors"] = [_tensor_report(p, pair.names[p.name], pre[p.name], post[p.name]) for p in params]
        layers.append(layer)
        if progress:
            progress(done, len(pair.selection))
    columns: dict[str, list[float]] = {}
    for layer in layers:
        for key, value in layer["drift"].items():
            columns.setdefault(key, []).append(value)
    return {
        "base": os.fspath(base),
        "tuned": os.fspath(tuned),
        "layers": layers,
        "mean": {key: sum(values) / len(values) for key, values in columns.items()},
        "max": {key: largest(values) for key, values in columns.items()},
        "warnings": pair.warnings,
    }


def _add_routing(
    layer: dict[str, Any],
    spec: AttentionSpec,
    params: Sequence[ParamMap],
    pre: Mapping[str, np.ndarray],
    post: Mapping[str, np.ndarray],
) -> None:
    per_head, q_top, k_top = layer_routing(spec, params, pre, post)
    if per_head:
        layer["drift"]["routing_rel"] = sum(per_head) / len(per_head)
        layer["routing_per_head"] = per_head
    for key, top in (("q_top_sv", q_top), ("k_top_sv", k_top)):
        if top is not None:
            layer["drift"][key] = top


def _tensor_report(param: ParamMap, name: str, pre: np.ndarray, post: np.ndarray) -> dict[str, Any]:
    """Drift of one tensor, whole and by role and head."""
    blocks = block_drift(param, pre, post)
    total = add([sums for _, sums in blocks])
    by_head: dict[str, dict[int, list[Sums]]] = {}
    for block, sums in blocks:
        if block.head is not None:
            by_head.setdefault(block.role, {}).setdefault(block.head, []).append(sums)
    heads = {
        role: {str(head): add(parts).rel for head, parts in sorted(found.items())}
        for role, found in sorted(by_head.items())
    }
    return {
        "name": name,
        "module": param.name,
        "kind": param.kind,
        "rel": total.rel,
        "1mcos": total.one_minus_cos,
        "rel_per_head": heads,
    }
