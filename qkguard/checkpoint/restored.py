"""What restoring changes in a raw folder: the rows of queries and keys, layer by layer, in the files that hold them.

The restored folder is made from the raw *files* (`checkpoint.write`), so "only Q/K differ" holds byte for byte and
memory stays at one layer's rows, whatever the model's size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qkguard.arrays import cast, dtype_name, has_nonfinite, sha256_of
from qkguard.checkpoint.safetensors_io import TensorEntry, write_rows
from qkguard.checkpoint.weights import BaseRows, WeightFolder
from qkguard.checkpoint.write import FolderPlan, OpenFile, Patch, Record, plan_files
from qkguard.drift import Sums, drift_of_blocks, weight_blocks
from qkguard.errors import QKGuardError
from qkguard.layout.rows import RowSelection
from qkguard.layout.selection import Selection, unselected_norms
from qkguard.layout.spec import Block, ParamMap
from qkguard.layout.wrappers import wrapped_names
from qkguard.restore.apply import check_device, restore_layer
from qkguard.restore.registry import Method, check_options, check_per_layer, get_method

MOST_AT_ONCE = 4
ROOM = 128 << 20  # bytes for the rows before and after SFT of what is patched at the same time


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
        entries: dict[str, list[TensorEntry]] = {}
        for param in maps:
            entries.setdefault(shared.file_of(param), []).append(weights.entry(names[param.name]))
        for file, changed in sorted(entries.items()):
            patches.setdefault(file, []).append(Patch.within(changed, partial(restore_rows, shared, index)))
    return FolderPlan(
        weights,
        Path(out),
        plan_files(weights, patches, wrapped_names(weights.where)),
        base=base.describe(),
        method={"name": method, **options, **rows.to_json()},
        at_once=_at_once(shared),
        partial=_left_tuned(selection),
        staging=staging,
        overwrite=overwrite,
    )


def _at_once(shared: RestoredRows) -> int:
    """How many layers may be patched at the same time: as many as there are processors and room for their rows."""
    if shared.method.computes:  # in float64, and on all processors
        return 1
    params = [param for _, maps in shared.selection for param in maps]
    largest = max(p.numel * shared.weights.dtype(shared.names[p.name]).itemsize for p in params)
    return max(1, min(MOST_AT_ONCE, os.cpu_count() or 1, ROOM // (2 * largest)))


def plan_unrestored(
    weights: WeightFolder,
    out: Path,
    base: BaseRows,
    *,
    rows: RowSelection | None = None,
    staging: Path | None = None,
    overwrite: bool = False,
) -> FolderPlan:
    """The plan of a folder that is the raw checkpoint under another name, where no restore is recommended.

    Arguments are those of `plan_restored`.
    """
    method = {"name": "raw", **(rows or RowSelection()).to_json()}
    files = plan_files(weights, {})
    return FolderPlan(weights, Path(out), files, base.describe(), method, staging=staging, overwrite=overwrite)


def _left_tuned(selection: Selection) -> list[str]:
    """Parameters with rows that feed keys and values alike, of which none is restored."""
    held = {p.name for spec, _ in selection for p in spec.params if any(b.shared for b in p.blocks)}
    restored = {p.name for _, params in selection for p in params if any(b.shared for b in p.blocks)}
    return sorted(held - restored)


def restore_rows(shared: RestoredRows, index: int, file: OpenFile) -> Record:
    """Patch one layer's rows as far as they lie in this file; the file of its first parameter reports on the layer.

    One parameter is in memory at a time, unless the method looks at all of a layer together.
    """
    spec, params = shared.selection[index]
    reports = shared.file_of(params[0]) == file.source
    record: Record = {"nonfinite": [], "layers": [], "tensors": []}
    blocks: list[tuple[Block, Sums]] = []
    said: dict[str, Any] = {}
    for together in [params] if shared.method.computes else [[param] for param in params]:
        here = [param for param in together if shared.file_of(param) == file.source]
        if not here and not reports:
            continue
        pre = {param.name: _rows_before(shared.base, param) for param in together}
        post = {param.name: shared.weights.read(shared.names[param.name], param) for param in together}
        new = restore_layer(
            shared.method, shared.options, spec, together, pre, post, gains=_gains(shared, index), device=shared.device
        )
        for param in here:
            name = param.name
            written = _write_rows(shared, param, file, pre[name], post[name], new.rows[name])
            record["tensors"].append({"index": index} | written)
        record["nonfinite"] += [shared.names[param.name] for param in here if has_nonfinite(post[param.name])]
        if reports:
            before = {name: cast(rows, post[name].dtype) for name, rows in pre.items()}
            blocks += weight_blocks(together, before, post)
            said |= new.report
            del before
        del pre, post, new  # before the next are read
    if reports:
        about = {"index": index, "layer": spec.layer, "module": spec.module, "kind": spec.kind}
        record["layers"].append(about | {"drift": drift_of_blocks(blocks)} | said)
    return record


def _write_rows(
    shared: RestoredRows, param: ParamMap, file: OpenFile, pre: np.ndarray, post: np.ndarray, new: np.ndarray
) -> dict[str, Any]:
    """Overwrite one parameter's rows; returns the manifest's entry of it."""
    entry = file.tensors[shared.names[param.name]]
    rows = round_to(new, entry.float_dtype, param.name)
    write_rows(file.fd, entry, param, rows)
    hashes = {"sha256_before": sha256_of(post), "sha256_after": sha256_of(rows)}
    # `restore` in the dtype it was kept in writes these very rows
    hashes["sha256_base"] = hashes["sha256_after"] if rows is pre else sha256_of(pre)
    return {"file": file.name} | describe_rows(param, entry) | hashes


def _rows_before(base: BaseRows, param: ParamMap) -> np.ndarray:
    rows = base.get(param)
    if tuple(rows.shape) != param.compact_shape:
        raise QKGuardError(
            f"{param.name}: the rows before SFT have shape {list(rows.shape)}, expected {list(param.compact_shape)}: "
            "the reference belongs to another model."
        )
    if has_nonfinite(rows):
        raise QKGuardError(f"{param.name} holds NaN or Inf before SFT: the base is damaged. Replace it.")
    return rows


def _gains(shared: RestoredRows, index: int) -> dict[str, np.ndarray]:
    """The gains of a layer's q/k norms that stay as tuned, for methods that ask for them."""
    if not shared.method.needs_gains(shared.options):
        return {}
    norms = [p for p in unselected_norms(shared.selection[index : index + 1]) if p.name in shared.names]
    return {p.name: shared.weights.read(shared.names[p.name], p) for p in norms}


def round_to(rows: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Rows in the file's dtype; QKGuardError where a value does not fit in it (bfloat16's range in float16)."""
    out = cast(rows, dtype)
    if has_nonfinite(out):
        raise QKGuardError(
            f"{name}: the rows to write hold NaN or Inf in {dtype_name(dtype)}; they came from "
            f"{dtype_name(rows.dtype)}."
        )
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
