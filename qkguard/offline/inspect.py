"""What `qkguard inspect` shows: where queries and keys are, how many bytes they take, what to look out for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkguard.checkpoint.weights import open_weights
from qkguard.errors import QKGuardError
from qkguard.layout import AttentionSpec, ParamMap, find_attention, prove_layout
from qkguard.layout.architecture import Architecture, build_meta, find_architecture, plain_torch
from qkguard.layout.layers import layer_types
from qkguard.layout.spec import join_ranges


def layout_report(
    model: Any, *, spec: Any = None, verify: bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The attention layout of a model as JSON values.

    Args:
        model: whatever `find_attention` takes: a folder, a hub id, the path of a config.json, a config, a live model.
        spec: a layout by hand.
        verify: prove the layout by replay (`prove_layout`).
        trust_remote_code: allow the model's own code to be imported.

    Returns:
        {"model", "model_type", "layer_kinds" {kind: count}, "layers" [...], "parameters" {total, query_key, share},
        "bytes" of the query and key rows, "dtype", "warnings", "verified"}: the last None, or one entry
        {"layers", "module", "ok", "problems", "partial"} for every distinct program.

    Raises:
        QKGuardError: the layout cannot be established; the message says what was seen.
    """
    specs = find_attention(model, spec=spec, trust_remote_code=trust_remote_code)
    architecture: Architecture | None = None
    try:
        architecture = find_architecture(model, trust_remote_code=trust_remote_code)
    except QKGuardError:
        if spec is None:
            raise
    types = layer_types(architecture.config) if architecture else None
    counts = Counter(types if types else [s.kind for s in specs])
    total, itemsize, dtype = _size(model, architecture)
    seen: set[str] = set()
    layers = [_layer(s, seen, itemsize) for s in specs]
    pure = sum(layer["query_key_parameters"] for layer in layers)
    return {
        "model": os.fspath(model) if isinstance(model, str | os.PathLike) else type(model).__name__,
        "model_type": architecture.config.model_type if architecture else None,
        "layer_kinds": dict(counts),
        "softmax_layers": len({s.layer for s in specs}),
        "layers": layers,
        "parameters": {"total": total, "query_key": pure, "share": pure / total if total else None},
        "bytes": pure * itemsize,
        "dtype": dtype,
        "warnings": _warnings(specs),
        "verified": _verified(model, specs, trust_remote_code) if verify else None,
    }


def _verified(model: Any, specs: Sequence[AttentionSpec], trust_remote_code: bool) -> list[dict[str, Any]]:
    return [
        {"layers": list(v.layers), "module": v.module, "ok": v.ok}
        | {"problems": list(v.problems), "partial": list(v.partial)}
        for v in prove_layout(model, specs, trust_remote_code=trust_remote_code)
    ]


def _layer(spec: AttentionSpec, seen: set[str], itemsize: int) -> dict[str, Any]:
    """One layer; parameters that an earlier layer owns are listed but not counted again."""
    params, numel = [], 0
    for param in sorted(spec.params, key=_reading_order):
        pure = param.only(lambda block: not block.shared)
        if param.name not in seen and param.kind != "norm":
            numel += pure.numel if pure.blocks else 0
        seen.add(param.name)
        params.append(
            {"name": param.name, "kind": param.kind, "shape": list(param.shape), "dim": param.dim}
            | {"rows": {role: _rows(param, role) for role in _roles(param)}}
        )
    return {
        "layer": spec.layer,
        "module": spec.module,
        "kind": spec.kind,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "rotary": spec.rotary,
        "rotary_dim": spec.rotary_dim,
        "params": params,
        "query_key_parameters": numel,
        "query_key_bytes": numel * itemsize,
        "notes": list(spec.notes),
    }


def _roles(param: ParamMap) -> list[str]:
    """Roles in the order of "qkv"."""
    return sorted({b.role for b in param.blocks}, key=_letters)


def _letters(role: str) -> list[int]:
    return ["qkv".index(letter) for letter in role]


def _reading_order(param: ParamMap) -> tuple[int, bool, str]:
    """Weights, biases, norms; in each, queries first."""
    return ("weight", "bias", "norm").index(param.kind), "q" not in "".join(_roles(param)), param.name


def _rows(param: ParamMap, role: str) -> list[list[int]]:
    return [list(r) for r in join_ranges((b.start, b.stop) for b in param.blocks if b.role == role)]


def _size(model: Any, architecture: Architecture | None) -> tuple[int | None, int, str]:
    """(parameters of the model, bytes of a query/key element, dtype): from the files where there are some."""
    if isinstance(model, str | os.PathLike) and Path(model).is_dir():
        try:
            weights = open_weights(Path(model))
        except QKGuardError:
            weights = None  # a folder with a config alone
        if weights is not None:
            from math import prod

            shapes = weights.shapes()
            largest = max(shapes, key=lambda name: prod(shapes[name]))
            try:
                dtype = weights.dtype(largest)
                return sum(map(prod, shapes.values())), dtype.itemsize, str(dtype).removeprefix("torch.")
            except QKGuardError:
                pass  # quantised: the size below is that of the unquantised model
    total = None
    if architecture is not None and architecture.model_class is not None:
        with plain_torch():
            total = sum(p.numel() for p in build_meta(architecture).parameters())
    return total, *_dtype(architecture)


def _dtype(architecture: Architecture | None) -> tuple[int, str]:
    """Bytes of an element and name of the config's dtype; bfloat16 where it does not say."""
    import torch

    said = next(
        (d for key in ("dtype", "torch_dtype") if architecture and (d := getattr(architecture.config, key, None))),
        "bfloat16",
    )
    name = str(said).removeprefix("torch.")
    return getattr(torch, name, torch.bfloat16).itemsize, name


def _warnings(specs: Sequence[AttentionSpec]) -> list[str]:
    out = []
    shared_rows = sorted({p.name for s in specs for p in s.params if any(b.shared for b in p.blocks)})
    if shared_rows:
        out.append(
            f"{len(shared_rows)} parameters have rows that feed keys and values alike ({shared_rows[0]}, ...): they "
            "are left tuned by default (shared=keep), so a restore is partial"
        )
    owners: dict[str, int] = Counter(p.name for s in specs for p in s.params)
    shared = sorted(name for name, count in owners.items() if count > 1)
    if shared:
        out.append(f"{len(shared)} parameters serve several layers ({shared[0]}, ...); each is restored once")
    out += sorted({note for s in specs for note in s.notes})
    return out
