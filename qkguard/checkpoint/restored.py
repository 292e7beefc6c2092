"""Raw folder -> restored folder: link what holds no queries and keys, copy the rest, patch the rows, rename.

The restored folder is made from the raw *files*, so "only Q/K differ" holds byte for byte and memory stays at one
layer's rows whatever the model's size. `RestoredWrite` has the steps that several ranks can share, `write_restored`
runs them in one process; `qkguard.offline.restore.restore_checkpoint` starts from two folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkguard.checkpoint.manifest import build_manifest
from qkguard.checkpoint.patched_folder import OpenFile, PatchedFolder, Progress
from qkguard.checkpoint.safetensors_io import TensorEntry, sha256_of, write_rows
from qkguard.checkpoint.scan import has_nonfinite
from qkguard.checkpoint.sources import QKSource
from qkguard.checkpoint.weights import open_weights
from qkguard.drift import projection_drift
from qkguard.errors import QKGuardError
from qkguard.layout.rows import RowSelection
from qkguard.layout.selection import Selection, unselected_norms
from qkguard.layout.spec import AttentionSpec, ParamMap
from qkguard.restore import check_device, check_options, check_per_layer, get_method, restore_layer


class RestoredWrite(PatchedFolder):
    """One restored folder in the making (`PatchedFolder` says how the ranks share the work).

    Args:
        raw: the checkpoint just saved, never changed.
        out: the folder to appear, complete or not at all.
        selection: layers and their parameters to restore (`layout.select`).
        names: parameter name -> tensor name in the raw files (`layout.disk_names`).
        source: the rows before SFT.
        method, options: a restore method (`qkguard.restore`) and its options; keys that are none are ignored.
        rows: what `selection` was made with, for the manifest and the method's checks.
        staging: assemble in this folder (on the file system of `out`) instead of beside `out`; needed where a
            background upload watches the folder around `out`.
        overwrite: replace an earlier restored folder at `out`.
        device: where the arithmetic of methods beyond copying runs.

    Methods that rotate look at the gains of q/k norms: `names` should hold those too (`unselected_norms`).

    Raises:
        QKGuardError: the raw folder is not a whole checkpoint, a parameter is missing, of another shape or quantised,
            or options that the method does not take.
    """

    def __init__(
        self,
        raw: Path,
        out: Path,
        selection: Selection,
        names: Mapping[str, str],
        source: QKSource,
        *,
        method: str = "restore",
        options: Mapping[str, Any] | None = None,
        rows: RowSelection | None = None,
        staging: Path | None = None,
        overwrite: bool = False,
        device: str = "cpu",
    ) -> None:
        super().__init__(open_weights(Path(raw)), out, staging=staging, overwrite=overwrite)
        self.selection, self.names, self.source = list(selection), names, source
        self.method, self.device = get_method(method), check_device(device)
        self.rows = rows or RowSelection()
        self.options = check_options(method, options or {}, self.rows.projections)
        self._check_selection()
        layers: dict[str, set[int]] = {file: set() for file in self.weights.files}
        for index, (_, params) in enumerate(self.selection):
            for param in params:
                layers[self._file(param)].add(index)
        self.jobs = self.plan(layers)

    def _check_selection(self) -> None:
        if not self.selection:
            raise QKGuardError("nothing to restore: no layer was selected; check layers and projections")
        check_per_layer(self.options, self.selection)
        shapes = self.weights.shapes()
        for param in (p for _, params in self.selection for p in params):
            name = self.names.get(param.name)
            if name is None or name not in shapes:
                raise QKGuardError(f"{self.raw} has no tensor for {param.name}; the layout belongs to another model")
            if shapes[name] != param.shape:
                raise QKGuardError(
                    f"{name} has shape {list(shapes[name])} in {self.raw}, expected {list(param.shape)}; "
                    "the layout belongs to another model"
                )
            self.weights.dtype(name)

    def _file(self, param: ParamMap) -> str:
        return self.weights.where[self.names[param.name]]

    def patch(self, file: OpenFile, hashing: ThreadPoolExecutor) -> None:
        for index in file.job.items:
            self._write_layer(file, index, hashing)

    def _write_layer(self, file: OpenFile, index: int, hashing: ThreadPoolExecutor) -> None:
        """Patch one layer's rows as far as they lie in this file; the file of its first parameter reports on it."""
        spec, params = self.selection[index]
        pre, post = {}, {}
        for param in params:
            pre[param.name] = self._rows_before(param)
            post[param.name] = self.weights.read(self.names[param.name], param)
            if has_nonfinite(post[param.name]):
                file.record["nonfinite"].append(self.names[param.name])
        new = restore_layer(
            self.method, self.options, spec, params, pre, post, gains=self._gains(index), device=self.device
        )
        tensors = []
        for param in params:
            if self._file(param) == file.job.file:
                entry = file.entries[self.names[param.name]]
                rows = round_to(new.rows[param.name], entry.torch_dtype, param.name)
                hashes = {"before": hashing.submit(sha256_of, post[param.name])}
                hashes["after"] = hashing.submit(sha256_of, rows)
                # `restore` in the dtype it was kept in writes these very rows
                same = rows is pre[param.name]
                hashes["base"] = hashes["after"] if same else hashing.submit(sha256_of, pre[param.name])
                write_rows(file.fd, entry, param, rows)
                tensors.append(({"index": index, "file": file.job.target} | describe_rows(param, entry), hashes))
        if self._file(params[0]) == file.job.file:
            cast = {p.name: pre[p.name].to(post[p.name].dtype) for p in params}
            file.record["layers"].append(
                {"index": index, "layer": spec.layer, "module": spec.module, "kind": spec.kind}
                | {"drift": projection_drift(params, cast, post)}
                | new.report
            )
        for tensor, hashes in tensors:
            file.record["tensors"].append(tensor | {f"sha256_{which}": h.result() for which, h in hashes.items()})

    def _gains(self, index: int) -> dict[str, Tensor]:
        """The gains of a layer's q/k norms that stay as tuned, for methods that ask for them."""
        if not self.method.needs_gains(self.options):
            return {}
        norms = [p for p in unselected_norms(self.selection[index : index + 1]) if p.name in self.names]
        return {p.name: self.weights.read(self.names[p.name], p) for p in norms}

    def _rows_before(self, param: ParamMap) -> Tensor:
        rows = self.source.get(param)
        if tuple(rows.shape) != param.compact_shape:
            raise QKGuardError(
                f"{param.name}: the rows before SFT have shape {list(rows.shape)}, expected "
                f"{list(param.compact_shape)}; the reference belongs to another model"
            )
        if has_nonfinite(rows):
            raise QKGuardError(f"{param.name} holds NaN or Inf before SFT: the base is damaged, replace it")
        return rows

    def manifest(
        self, results: Sequence[Mapping[str, Any]], taken: list[str], left: list[str], extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        skipped = {e for spec, _ in self.selection for e in _with_shared_rows(spec)}
        skipped -= {p.name for _, ps in self.selection for p in ps if any(b.shared for b in p.blocks)}
        return build_manifest(
            raw=os.path.relpath(self.raw.resolve(), self.out.resolve()),
            base=self.source.describe(),
            method={"name": self.method.name, **self.options, **self.rows.to_json()},
            results=results,
            companions=taken,
            left_out=left,
            partial=sorted(skipped),
            warnings=fallbacks(self.method.name, [layer for record in results for layer in record["layers"]]),
            extra=extra,
        )


def write_restored(
    raw: Path,
    out: Path,
    selection: Selection,
    names: Mapping[str, str],
    source: QKSource,
    *,
    extra: Callable[[], Mapping[str, Any]] | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """All steps of `RestoredWrite` in one process; `settings` are its keyword arguments. Returns the manifest.

    `extra` goes to `commit`; a function is called for it after the files are written.
    """
    write = RestoredWrite(raw, out, selection, names, source, **settings)
    try:
        write.prepare()
        results = write.run(progress=progress)
        return write.commit(results, extra() if callable(extra) else extra)
    except BaseException:
        write.abort()
        raise


def round_to(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Rows in the file's dtype; QKGuardError where a value does not fit in it (bfloat16's range in float16)."""
    out = rows.to(dtype)
    if has_nonfinite(out):
        raise QKGuardError(f"{name}: the rows to write hold NaN or Inf in {dtype}; they came from {rows.dtype}")
    return out


def fallbacks(method: str, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each reason for which a method did less than its name says, with the layers concerned."""
    found: dict[str, list[str]] = {}
    for layer in sorted(layers, key=lambda layer: layer["index"]):
        if "fallback" in layer:
            found.setdefault(layer["fallback"], []).append(str(layer["layer"]))
    return [f"{method} fell back in layer(s) {', '.join(where)} to {what}" for what, where in found.items()]


def _with_shared_rows(spec: AttentionSpec) -> Iterator[str]:
    return (p.name for p in spec.params if any(b.shared for b in p.blocks))


def describe_rows(param: ParamMap, entry: TensorEntry) -> dict[str, Any]:
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
