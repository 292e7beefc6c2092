"""Raw folder -> restored folder: link what holds no queries and keys, copy the rest, patch the rows, rename.

The restored folder is made from the raw *files*, so "only Q/K differ" holds byte for byte and memory stays at one
layer's rows whatever the model's size. `RestoredWrite` has the steps that several ranks can share, `write_restored`
runs them in one process; `qkguard.offline.restore_checkpoint` starts from two folders.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkguard.card import model_card, read_card
from qkguard.companions import companions
from qkguard.drift_offline import projection_drift
from qkguard.errors import QKGuardError
from qkguard.files import CREATE, Staging, can_clone, copy_bytes, copy_file, link_or_copy, write_text
from qkguard.layout.spec import AttentionSpec, ParamMap
from qkguard.manifest import MANIFEST, build_manifest, describe_file, dump
from qkguard.pickles import PickleFolder
from qkguard.restore import get_method
from qkguard.safetensors_io import TensorEntry, sha256_of, write_rows
from qkguard.scan import has_nonfinite
from qkguard.sources import QKSource
from qkguard.weights import INDEX, SafetensorsFolder, open_weights, opened

Selection = Sequence[tuple[AttentionSpec, tuple[ParamMap, ...]]]
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class Job:
    """One weight file: `layers` are the selected layers (indices) with rows in it; without any it is linked."""

    file: str
    target: str
    layers: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class _OpenFile:
    """A weight file being patched: where its tensors are, and what will be said of it."""

    job: Job
    fd: int
    entries: Mapping[str, TensorEntry]
    record: dict[str, Any]


class RestoredWrite:
    """One restored folder in the making.

    Every rank that takes part builds the same object (only headers are read) and the ranks must see the same disk:
    `prepare` on rank 0; then `run(rank, world)` anywhere; then `commit` with everybody's results on rank 0, or `abort`
    there after any failure. The caller keeps the ranks in step between these.

    Args:
        raw: the checkpoint just saved, never changed.
        out: the folder to appear, complete or not at all.
        selection: layers and their parameters to restore (`layout.select`).
        names: parameter name -> tensor name in the raw files (`layout.disk_names`).
        source: the rows before SFT.
        method, options: a restore method (`qkguard.restore`) and options; those it does not know are ignored.
        selected: the options of `layout.select` that `selection` was made with, for the manifest.
        staging: assemble in this folder (on the file system of `out`) instead of beside `out`; needed where a
            background upload watches the folder around `out`.
        overwrite: replace an earlier restored folder at `out`.
        allow_pickle: also read `pytorch_model*.bin`; they are written as safetensors.

    Raises:
        QKGuardError: the raw folder is not a whole checkpoint, a parameter is missing, of another shape or quantised.
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
        selected: Mapping[str, Any] | None = None,
        staging: Path | None = None,
        overwrite: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        self.raw, self.out = Path(raw), Path(out)
        self.selection, self.names, self.source = list(selection), names, source
        self.method, self.overwrite = get_method(method), overwrite
        self.selected = {"parts": ["q", "k"]} | dict(selected or {})
        self.options = {k: v for k, v in (options or {}).items() if k in self.method.options}
        self.weights = open_weights(self.raw, allow_pickle=allow_pickle)
        self._check_selection()
        self.staging = Staging(self.out, staging)
        self.jobs = self._plan()

    def _check_selection(self) -> None:
        if not self.selection:
            raise QKGuardError("nothing to restore: no layer was selected; check layers= and parts=")
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

    def _plan(self) -> list[Job]:
        """Jobs in descending order of work, so that dealing them out over ranks balances it."""
        layers: dict[str, set[int]] = {file: set() for file in self.weights.files}
        for index, (_, params) in enumerate(self.selection):
            for param in params:
                layers[self._file(param)].add(index)
        jobs = [
            Job(file, _target(file), tuple(sorted(found)), (self.raw / file).stat().st_size)
            for file, found in layers.items()
        ]
        return sorted(jobs, key=lambda job: (-job.nbytes * bool(job.layers), job.file))

    def _file(self, param: ParamMap) -> str:
        return self.weights.where[self.names[param.name]]

    def prepare(self) -> None:
        """Rank 0: clear what killed processes left, check the space, make the temporary folder."""
        check_target([self.raw], self.out, self.overwrite)
        with readable_errors(self.out):
            self.staging.create()
            self._check_space()

    def _check_space(self) -> None:
        folder = self.staging.path
        same_disk = folder.stat().st_dev == self.raw.stat().st_dev
        need = sum(job.nbytes for job in self.jobs if job.layers or not same_disk)
        free = shutil.disk_usage(folder).free
        if need > free and not can_clone(self.raw / self.jobs[0].file, folder):
            raise QKGuardError(
                f"not enough space for {self.out}: {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
                "free some or choose another disk"
            )

    def run(self, rank: int = 0, world: int = 1, progress: Progress | None = None) -> list[dict[str, Any]]:
        """Write every `world`-th weight file, from `rank` on; the records (JSON values) are for `commit`."""
        jobs = self.jobs[rank::world]
        total, done = sum(job.nbytes for job in jobs), 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            if progress:
                progress(done, total)

        mode = self.staging.path.stat().st_mode & 0o666
        # Hashing leaves the interpreter's lock, so it runs beside the reading and the drift sums.
        with readable_errors(self.out), ThreadPoolExecutor(1) as hashing:
            return [self._write_file(job, mode, hashing, tick) for job in jobs]

    def _write_file(
        self, job: Job, mode: int, hashing: ThreadPoolExecutor, tick: Callable[[int], None]
    ) -> dict[str, Any]:
        source, target = self.raw / job.file, self.staging.path / job.target
        target.parent.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"file": job.file, "target": job.target, "raw": describe_file(source)}
        record |= {"layers": [], "tensors": [], "nonfinite": []}
        if not job.layers and isinstance(self.weights, SafetensorsFolder):
            record["made"] = "linked" if link_or_copy(source, target, mode) else "copied"
            tick(job.nbytes)
            return record | {"restored": dict(record["raw"])}
        with os.fdopen(os.open(target, CREATE, 0o666), "r+b") as file:
            entries: Mapping[str, TensorEntry]
            if isinstance(self.weights, PickleFolder):
                entries, record["made"] = self.weights.convert(job.file, file), "converted"
                tick(job.nbytes)
            else:
                entries, record["made"] = self.weights.files[job.file].tensors, "patched"
                with opened(source) as fd:
                    copy_bytes(fd, file.fileno(), tick)
            for index in job.layers:
                self._write_layer(_OpenFile(job, file.fileno(), entries, record), index, hashing)
            os.fsync(file.fileno())
        return record | {"restored": describe_file(target)}

    def _write_layer(self, file: _OpenFile, index: int, hashing: ThreadPoolExecutor) -> None:
        """Patch one layer's rows as far as they lie in this file; the file of its first parameter reports on it."""
        spec, params = self.selection[index]
        pre, post = {}, {}
        for param in params:
            pre[param.name] = self._rows_before(param)
            post[param.name] = self.weights.read(self.names[param.name], param)
            if has_nonfinite(post[param.name]):
                file.record["nonfinite"].append(self.names[param.name])
        new = self.method.function(spec, params, pre, post, **self.options)
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
                tensors.append(({"index": index, "file": file.job.target} | _describe(param, entry), hashes))
        if self._file(params[0]) == file.job.file:
            cast = {p.name: pre[p.name].to(post[p.name].dtype) for p in params}
            file.record["layers"].append(
                {"index": index, "layer": spec.layer, "module": spec.module, "kind": spec.kind}
                | {"drift": projection_drift(params, cast, post)}
                | new.report
            )
        for tensor, hashes in tensors:
            file.record["tensors"].append(tensor | {f"sha256_{which}": h.result() for which, h in hashes.items()})

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

    def commit(self, results: Sequence[Mapping[str, Any]], extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Rank 0: the other files, the manifest last, then one rename; returns the manifest.

        `extra` has further top-level keys for it (step, probe results); its "warnings" and "nonfinite" (names of
        tensors with NaN or Inf) are added to those found while writing.
        """
        if sorted(r["file"] for r in results) != sorted(job.file for job in self.jobs):
            raise QKGuardError(f"{self.out}: not every weight file was written; nothing is published")
        with readable_errors(self.out):
            taken, left = companions(self.raw)
            for name in taken:
                target = self.staging.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                copy_file(self.raw / name, target)
            taken += self._write_index(results)
            skipped = {e for spec, _ in self.selection for e in _entangled(spec)}
            skipped -= {p.name for _, ps in self.selection for p in ps if any(b.entangled for b in p.blocks)}
            manifest = build_manifest(
                raw=os.path.relpath(self.raw.resolve(), self.out.resolve()),
                base=self.source.describe(),
                method={"name": self.method.name, **self.options, **self.selected},
                results=sorted(results, key=lambda r: r["file"]),
                companions=taken,
                left_out=[name for name in left if name not in self.weights.files],
                partial=sorted(skipped),
                warnings=[],
                extra=extra or {},
            )
            write_text(self.staging.path / "README.md", model_card(manifest, read_card(self.raw)))
            write_text(self.staging.path / MANIFEST, dump(manifest))
            self.staging.publish(replace=self.overwrite)
        return json.loads(dump(manifest))

    def _write_index(self, results: Sequence[Mapping[str, Any]]) -> list[str]:
        """The index of a sharded checkpoint: the raw one's bytes, or a new one where pickles were converted."""
        if isinstance(self.weights, SafetensorsFolder):
            if self.weights.index:
                copy_file(self.raw / self.weights.index, self.staging.path / self.weights.index)
            return [self.weights.index] if self.weights.index else []
        if len(self.jobs) == 1:
            return []
        where = {name: _target(file) for name, file in self.weights.where.items()}
        size = sum(r["restored"]["size"] for r in results)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        write_text(self.staging.path / INDEX, json.dumps(index, indent=2) + "\n")
        return [INDEX]

    def abort(self) -> None:
        """Rank 0: remove the temporary folder."""
        self.staging.discard()


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


def check_target(sources: Sequence[Path], out: Path, overwrite: bool) -> None:
    """Refuse a target folder that is taken, or that is or holds what it is made from."""
    for source in sources:
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise QKGuardError(f"{out} is or contains a folder it is made from ({source}); choose another one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise QKGuardError(f"{out} exists; remove it, choose another folder, or overwrite it (--overwrite)")
        if not (out / MANIFEST).is_file():
            raise QKGuardError(f"{out} exists and was not written by qkguard; remove it yourself")


def round_to(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Rows in the file's dtype; QKGuardError where a value does not fit in it (bfloat16's range in float16)."""
    out = rows.to(dtype)
    if has_nonfinite(out):
        raise QKGuardError(f"{name}: the rows to write hold NaN or Inf in {dtype}; they came from {rows.dtype}")
    return out


@contextmanager
def readable_errors(out: Path) -> Iterator[None]:
    """System errors as one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise QKGuardError(f"no space left for {out}; nothing was written; free some space") from error
        raise QKGuardError(f"cannot write {out}: {error.strerror} ({error.filename or 'data'})") from error


def _target(file: str) -> str:
    """The name of a weight file in the restored folder: its own, but pickles become safetensors."""
    if file.endswith(".safetensors"):
        return file
    return file.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def _entangled(spec: AttentionSpec) -> Iterator[str]:
    return (p.name for p in spec.params if any(b.entangled for b in p.blocks))


def _describe(param: ParamMap, entry: TensorEntry) -> dict[str, Any]:
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
