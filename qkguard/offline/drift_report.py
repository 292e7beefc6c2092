"""Drift between two checkpoints on disk, a layer at a time: the numbers of training without a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

from torch import Tensor

from qkguard.drift import add, block_drift, largest, layer_routing, projection_drift
from qkguard.layout.rows import RowOptions, RowSelection
from qkguard.layout.spec import AttentionSpec, ParamMap


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
        base, tuned: folders or hub ids; the base is read in the tuned checkpoint's dtype, so that 0 means that
            restoring would change nothing.
        routing: also routing drift per head and the top singular values of W - W0 (float64 products; most of the
            time).
        progress: called with (layers done, layers in all).
        spec, trust_remote_code, rows: as in `restore_checkpoint`.

    Returns:
        {"base", "tuned", "layers": [...], "mean": {...}, "max": {...}, "warnings"}. A layer has its drift under the
        metric names of training (q_rel, k_rel, q_1mcos, k_1mcos, routing_rel, q_top_sv, k_top_sv), routing_per_head,
        and per tensor rel, 1mcos and the same per head. Memory: one layer's rows, in float64 with `routing`.

    Raises:
        QKGuardError: as `restore_checkpoint`.
    """
    from qkguard.offline.pair import find_pair, open_folders

    pair = find_pair(
        open_folders(base, tuned), rows=RowSelection.of(rows), spec=spec, trust_remote_code=trust_remote_code
    )
    layers = []
    for done, (spec, params) in enumerate(pair.selection, 1):
        post = {p.name: pair.weights.read(pair.names[p.name], p) for p in params}
        pre = {p.name: pair.base.get(p).to(post[p.name].dtype) for p in params}
        layers.append(_layer_report(spec, params, pre, post, pair.names, routing=routing))
        if progress:
            progress(done, len(pair.selection))
    keys = list(dict.fromkeys(key for layer in layers for key in layer["drift"]))
    columns = {key: [layer["drift"][key] for layer in layers if key in layer["drift"]] for key in keys}
    return {
        "base": os.fspath(base),
        "tuned": os.fspath(tuned),
        "layers": layers,
        "mean": {key: sum(values) / len(values) for key, values in columns.items()},
        "max": {key: largest(values) for key, values in columns.items()},
        "warnings": pair.warnings,
    }


def _layer_report(
    spec: AttentionSpec,
    params: Sequence[ParamMap],
    pre: Mapping[str, Tensor],
    post: Mapping[str, Tensor],
    names: Mapping[str, str],
    *,
    routing: bool,
) -> dict[str, Any]:
    drift = projection_drift(params, pre, post)
    out: dict[str, Any] = {"layer": spec.layer, "module": spec.module, "kind": spec.kind, "drift": drift}
    if routing:
        per_head, q_top, k_top = layer_routing(spec, params, pre, post)
        if per_head:
            drift["routing_rel"] = sum(per_head) / len(per_head)
            out["routing_per_head"] = per_head
        drift |= {key: top for key, top in (("q_top_sv", q_top), ("k_top_sv", k_top)) if top is not None}
    out["tensors"] = []
    for param in params:
        blocks = block_drift(param, pre[param.name], post[param.name])
        total = add([sums for _, sums in blocks])
        heads: dict[str, dict[str, float]] = {}
        for role in sorted({b.role for b, _ in blocks}):
            numbers = sorted({b.head for b, _ in blocks if b.role == role and b.head is not None})
            if numbers:
                heads[role] = {
                    str(head): add([s for b, s in blocks if b.role == role and b.head == head]).rel for head in numbers
                }
        out["tensors"].append(
            {"name": names[param.name], "module": param.name, "kind": param.kind}
            | {"rel": total.rel, "1mcos": total.one_minus_cos, "rel_per_head": heads}
        )
    return out
