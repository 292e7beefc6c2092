"""What `qkguard inspect` shows: where queries and keys are, how many bytes they take, what to look out for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch

from qkguard.arrays import dtype_name
from qkguard.checkpoint.weights import open_weights
from qkguard.errors import QKGuardError
from qkguard.layout import AttentionSpec, ParamMap, find_attention, prove_layout
from qkguard.layout.architecture import Architecture, build_meta, find_architecture, plain_torch
from qkguard.layout.layers import layer_types
from qkguard.layout.spec import join_ranges

SHOWN = ("layer", "module", "kind", "num_heads", "num_kv_heads", "head_dim", "rotary", "rotary_dim")
"""What a layer's entry takes over from its `AttentionSpec`."""


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
    total, dtype = _size(model, architecture)
    layers = _layers(specs, dtype.itemsize)
    selected = sum(layer["query_key_parameters"] for layer in layers)
    verified = None
    if verify:
        proofs = prove_layout(model, specs, trust_remote_code=trust_remote_code)
        verified = [asdict(proof) | {"ok": proof.ok} for proof in proofs]
    return {
        "model": os.fspath(model) if isinstance(model, str | os.PathLike) else type(model).__name__,
        "model_type": architecture.config.model_type if architecture else None,
        "layer_kinds": dict(Counter(types or [spec.kind for spec in specs])),
        "softmax_layers": len({spec.layer for spec in specs}),
        "layers": layers,
        "parameters": {"total": total, "query_key": selected, "share": selected / total if total else None},
        "bytes": selected * dtype.itemsize,
        "dtype": dtype_name(dtype),
        "warnings": _warnings(specs),
        "verified": verified,
    }


def _layers(specs: Sequence[AttentionSpec], itemsize: int) -> list[dict[str, Any]]:
    """One entry per layer; a parameter that several layers use is listed in each and counted in the first."""
    seen: set[str] = set()
    layers = []
    for spec in specs:
        own = [param for param in spec.params if param.kind != "norm" and param.name not in seen]
        seen.update(param.name for param in own)
        numel = sum(param.pure.numel for param in own)
        entry = {name: getattr(spec, name) for name in SHOWN}
        entry["params"] = [_param(param) for param in sorted(spec.params, key=_reading_order)]
        entry |= {"query_key_parameters": numel, "query_key_bytes": numel * itemsize, "notes": list(spec.notes)}
        layers.append(entry)
    return layers


def _param(param: ParamMap) -> dict[str, Any]:
    rows = {}
    for role in _roles(param):
        ranges = join_ranges((block.start, block.stop) for block in param.blocks if block.role == role)
        rows[role] = [list(one) for one in ranges]
    return {"name": param.name, "kind": param.kind, "shape": list(param.shape), "dim": param.dim, "rows": rows}


def _roles(param: ParamMap) -> list[str]:
    """Roles in the order of "qkv", which is not the alphabet's."""
    return sorted({block.role for block in param.blocks}, key=_qkv_order)


def _qkv_order(role: str) -> list[int]:
    return ["qkv".index(letter) for letter in role]


def _reading_order(param: ParamMap) -> tuple[int, bool, str]:
    """Weights, biases, norms; in each, queries first."""
    return ("weight", "bias", "norm").index(param.kind), "q" not in "".join(_roles(param)), param.name


def _size(model: Any, architecture: Architecture | None) -> tuple[int | None, Any]:
    """Parameters of the model and dtype of queries and keys: from the files where there are some."""
    try:
        if isinstance(model, str | os.PathLike) and Path(model).is_dir():
            weights = open_weights(Path(model))
            sizes = {name: prod(shape) for name, shape in weights.shapes().items()}
            return sum(sizes.values()), weights.dtype(max(sizes, key=sizes.__getitem__))
    except QKGuardError:
        pass  # a folder with a config alone, or quantised: the size is that of the unquantised model
    if architecture is None:
        return None, torch.bfloat16
    total = None
    if architecture.model_class is not None:
        with plain_torch():
            total = sum(param.numel() for param in build_meta(architecture).parameters())
    config = architecture.config
    named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    dtype = getattr(torch, dtype_name(named), None)
    return total, dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _warnings(specs: Sequence[AttentionSpec]) -> list[str]:
    out = []
    mixed = sorted({param.name for spec in specs for param in spec.params if param.pure != param})
    if mixed:
        out.append(
            f"{len(mixed)} parameters have rows that feed both keys and values ({mixed[0]}, ...). They stay tuned by "
            "default (shared=keep), so a restore is partial."
        )
    users = Counter(param.name for spec in specs for param in spec.params)
    reused = sorted(name for name, count in users.items() if count > 1)
    if reused:
        out.append(f"{len(reused)} parameters serve several layers ({reused[0]}, ...); each is restored once.")
    return [*out, *sorted({note for spec in specs for note in spec.notes})]
