"""What restoring changes in a raw folder: the rows of queries and keys, layer by layer, in the files that hold them.

The restored folder is made from the raw *files* (`checkpoint.write`), so "only Q/K differ" holds byte for byte and
memory stays at one layer's rows, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkguard.checkpoint.safetensors_io import TensorEntry, sha256_of, write_rows
from qkguard.checkpoint.weights import BaseRows, WeightFolder, has_nonfinite
from qkguard.checkpoint.write import FolderPlan, OpenFile, Patch, Record, plan_files
from qkguard.drift import projection_drift
from qkguard.errors import QKGuardError
from qkguard.layout.rows import RowSelection
from qkguard.layout.selection import Selection, unselected_norms
from qkguard.layout.spec import ParamMap
from qkguard.layout.wrappers import wrapped_names
from qkguard.restore.apply import check_device, restore_layer
from qkguard.restore.registry import Method, check_options, check_per_layer, get_method


@dataclass(frozen=True)
class RestoredRows:
    """What the patches of all layers share; `plan_restored` says what each is."""

    weights: WeightFolder
    selection: Selection
    names: Mapping[str, str]
    base: BaseRows
    method: Method
    options: Mapping[str, Any]
    device: str

    def file_of(self, param: ParamMap) -> str:
        return self.weights.where[self.names[param.name]]


def plan_restored(
    weights: WeightFolder,
    out: Path,
    selection: Selection,
    names: Mapping[str, str],
    base: BaseRows,
    *,
    method: str = "restore",
    options: Mapping[str, Any] | None = None,
    rows: RowSelection | None = None,
    staging: Path | None = None,
    overwrite: bool = False,
    device: str = "cpu",
) -> FolderPlan:
    """The plan of a restored folder; only headers have been read for it.

    Args:
        weights: the checkpoint just saved, opened; never changed.
        out: the folder to appear, complete or not at all.
        selection: layers and their parameters to restore (`layout.select`).
        names: parameter name -> tensor name in the raw files (`layout.disk_names`). Methods that rotate look at the
            gains of q/k norms: it should hold those too (`unselected_norms`).
        base: the rows before SFT.
        method, options: a restore method (`qkguard.restore`) and its options; keys that are none are ignored.
        rows: what `selection` was made with, for the manifest and the method's checks.
        staging, overwrite: as in `FolderPlan`.
        device: where the arithmetic of methods beyond copying runs.

    Raises:
        QKGuardError: a parameter is missing, of another shape or quantised, tensors that no loadable name can be given
            to (`wrapped_names`), or options that the method does not take.
    """
    rows = rows or RowSelection()
    options = check_options(method, options or {}, rows.projections)
    if not selection:
        raise QKGuardError("There is nothing to restore: no layer is selected. Check layers and projections.")
    check_per_layer(options, selection)
    params = [param for _, maps in selection for param in maps]
    weights.check(params, names, "the raw checkpoint", "the layout belongs to another model")
    shared = RestoredRows(weights, selection, names, base, get_method(method), options, check_device(device))
    patches: dict[str, list[Patch]] = {}
    for index, (_, maps) in enumerate(selection):
        for file in sorted({shared.file_of(param) for param in maps}):
            patches.setdefault(file, []).append(partial(restore_rows, shared, index))
    return FolderPlan(
        weights,
        Path(out),
        plan_files(weights, patches, wrapped_names(weights.where)),
        base=base.describe(),
        method={"name": method, **options, **rows.to_json()},
        partial=_left_tuned(selection),
        staging=staging,
        overwrite=overwrite,
    )


def _left_tuned(selection: Selection) -> list[str]:
    """Parameters with rows that feed keys and values alike, of which none is restored."""
    held = {p.name for spec, _ in selection for p in spec.params if any(b.shared for b in p.blocks)}
    restored = {p.name for _, params in selection for p in params if any(b.shared for b in p.blocks)}
    return sorted(held - restored)


def restore_rows(shared: RestoredRows, index: int, file: OpenFile) -> Record:
    """Patch one layer's rows as far as they lie in this file; the file of its first parameter reports on the layer."""
    spec, params = shared.selection[index]
    pre = {param.name: _rows_before(shared.base, param) for param in params}
    post = {param.name: shared.weights.read(shared.names[param.name], param) for param in params}
    new = restore_layer(
        shared.method, shared.options, spec, params, pre, post, gains=_gains(shared, index), device=shared.device
    )
    tensors = []
    for param in params:
        if shared.file_of(param) == file.name:
            entry = file.tensors[shared.names[param.name]]
            rows = round_to(new.rows[param.name], entry.torch_dtype, param.name)
            hashes = {"before": file.hashing.submit(sha256_of, post[param.name])}
            hashes["after"] = file.hashing.submit(sha256_of, rows)
            # `restore` in the dtype it was kept in writes these very rows
            same = rows is pre[param.name]
            hashes["base"] = hashes["after"] if same else file.hashing.submit(sha256_of, pre[param.name])
            write_rows(file.fd, entry, param, rows)
            tensors.append(({"index": index, "file": file.name} | describe_rows(param, entry), hashes))
    layers = []
    if shared.file_of(params[0]) == file.name:
        cast = {p.name: pre[p.name].to(post[p.name].dtype) for p in params}
        drift = projection_drift(params, cast, post)
        about = {"index": index, "layer": spec.layer, "module": spec.module, "kind": spec.kind, "drift": drift}
        layers.append(about | new.report)
    return {
        "nonfinite": [shared.names[name] for name, rows in post.items() if has_nonfinite(rows)],
        "layers": layers,
        "tensors": [t | {f"sha256_{which}": h.result() for which, h in hashes.items()} for t, hashes in tensors],
    }


def _rows_before(base: BaseRows, param: ParamMap) -> Tensor:
    rows = base.get(param)
    if tuple(rows.shape) != param.compact_shape:
        raise QKGuardError(
            f"{param.name}: the rows before SFT have shape {list(rows.shape)}, expected {list(param.compact_shape)}: "
            "the reference belongs to another model."
        )
    if has_nonfinite(rows):
        raise QKGuardError(f"{param.name} holds NaN or Inf before SFT: the base is damaged. Replace it.")
    return rows


def _gains(shared: RestoredRows, index: int) -> dict[str, Tensor]:
    """The gains of a layer's q/k norms that stay as tuned, for methods that ask for them."""
    if not shared.method.needs_gains(shared.options):
        return {}
    norms = [p for p in unselected_norms(shared.selection[index : index + 1]) if p.name in shared.names]
    return {p.name: shared.weights.read(shared.names[p.name], p) for p in norms}


def round_to(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Rows in the file's dtype; QKGuardError where a value does not fit in it (bfloat16's range in float16)."""
    out = rows.to(dtype)
    if has_nonfinite(out):
        raise QKGuardError(f"{name}: the rows to write hold NaN or Inf in {dtype}; they came from {rows.dtype}.")
    return out


def describe_rows(param: ParamMap, entry: TensorEntry) -> dict[str, Any]:
    """The manifest's entry of one patched tensor, without its hashes."""
    return {
        "name": entry.name,
        "module": param.name,
        "kind": param.kind,
        "roles": "".join(sorted({b.role for b in param.blocks})),
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "dim": param.dim,
        "ranges": [list(r) for r in param.ranges],
    }
