"""A checkpoint folder made from another one: link what stays, copy and patch what changes, rename into place.

`PatchedFolder` is the part that restoring and merging have in common; what the patches are, and what the manifest says
of them, is the subclass's.
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

from qkguard.checkpoint.auxiliary import auxiliary_files
from qkguard.checkpoint.card import model_card, read_card
from qkguard.checkpoint.files import CREATE, Staging, can_clone, copy_bytes, copy_named, link_or_copy, write_text
from qkguard.checkpoint.manifest import MANIFEST, describe_file, dump
from qkguard.checkpoint.safetensors_io import TensorEntry
from qkguard.checkpoint.weights import WeightFolder, opened
from qkguard.errors import QKGuardError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class Job:
    """One weight file: `items` are the patches in it (indices of the subclass); without any it is linked."""

    file: str
    target: str
    items: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class OpenFile:
    """A weight file being patched: where its tensors are, and what will be said of it."""

    job: Job
    fd: int
    entries: Mapping[str, TensorEntry]
    record: dict[str, Any]


class PatchedFolder:
    """One folder in the making, from the files of `raw`.

    Every rank that takes part builds the same object (only headers are read) and the ranks must see the same disk:
    `prepare` on rank 0; then `run(rank, world)` anywhere; then `commit` with everybody's results on rank 0, or `abort`
    there after any failure. The caller keeps the ranks in step between these.

    Args:
        weights: the folder's weights, opened; never changed.
        out: the folder to appear, complete or not at all.
        staging: assemble in this folder (on the file system of `out`) instead of beside `out`; needed where a
            background upload watches the folder around `out`.
        overwrite: replace an earlier folder of qkguard's at `out`.
    """

    def __init__(
        self, weights: WeightFolder, out: Path, *, staging: Path | None = None, overwrite: bool = False
    ) -> None:
        self.weights, self.raw, self.out, self.overwrite = weights, weights.folder, Path(out), overwrite
        self.staging = Staging(self.out, staging)
        self.jobs: list[Job] = []

    def plan(self, items: Mapping[str, set[int]]) -> list[Job]:
        """Jobs from the patches in every file, in descending order of work, so that dealing them out balances it."""
        jobs = [
            Job(file, file, tuple(sorted(found)), (self.raw / file).stat().st_size) for file, found in items.items()
        ]
        return sorted(jobs, key=lambda job: (-job.nbytes * bool(job.items), job.file))

    def patch(self, file: OpenFile, hashing: ThreadPoolExecutor) -> None:
        """Write everything that changes in one file, and say so in its record."""
        raise NotImplementedError

    def manifest(
        self, results: Sequence[Mapping[str, Any]], taken: list[str], left: list[str], extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The manifest from all files' records and the other files copied and left out."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Rank 0: clear what killed processes left, check the space, make the temporary folder."""
        check_target([self.raw], self.out, self.overwrite)
        with readable_errors(self.out):
            self.staging.create()
            self._check_space()

    def _check_space(self) -> None:
        folder = self.staging.path
        same_disk = folder.stat().st_dev == self.raw.stat().st_dev
        need = sum(job.nbytes for job in self.jobs if job.items or not same_disk)
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
            return [self.write_file(job, mode, hashing, tick) for job in jobs]

    def write_file(
        self, job: Job, mode: int, hashing: ThreadPoolExecutor, tick: Callable[[int], None]
    ) -> dict[str, Any]:
        source, target = self.raw / job.file, self.staging.path / job.target
        target.parent.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"file": job.file, "target": job.target, "raw": describe_file(source)}
        record |= {"layers": [], "tensors": [], "nonfinite": []}
        if not job.items:
            record["made"] = "linked" if link_or_copy(source, target, mode) else "copied"
            tick(job.nbytes)
            return record | {"restored": dict(record["raw"])}
        with os.fdopen(os.open(target, CREATE, 0o666), "r+b") as file:
            entries, record["made"] = self.weights.files[job.file].tensors, "patched"
            with opened(source) as fd:
                copy_bytes(fd, file.fileno(), tick)
            self.patch(OpenFile(job, file.fileno(), entries, record), hashing)
            os.fsync(file.fileno())
        return record | {"restored": describe_file(target)}

    def commit(self, results: Sequence[Mapping[str, Any]], extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Rank 0: the other files, the manifest last, then one rename; returns the manifest.

        `extra` has further top-level keys for it (step, probe results); its "warnings" and "nonfinite" (names of
        tensors with NaN or Inf) are added to those found while writing.
        """
        if sorted(r["file"] for r in results) != sorted(job.file for job in self.jobs):
            raise QKGuardError(f"{self.out}: not every weight file was written; nothing is published")
        with readable_errors(self.out):
            taken, left = self.copy_companions()
            taken += self.write_index(results)
            left = [name for name in left if name not in self.weights.files and name not in taken]
            manifest = self.manifest(sorted(results, key=lambda r: r["file"]), taken, left, extra or {})
            write_text(self.staging.path / "README.md", model_card(manifest, self.card()))
            write_text(self.staging.path / MANIFEST, dump(manifest))
            self.staging.publish(replace=self.overwrite)
        return json.loads(dump(manifest))

    def copy_companions(self) -> tuple[list[str], list[str]]:
        """Copy what travels with the weights; (files taken, files left out)."""
        taken, left = auxiliary_files(self.raw)
        for name in taken:
            copy_named(self.raw, name, self.staging.path)
        return taken, left

    def card(self) -> str | None:
        """The text of the model card whose metadata is taken over."""
        return read_card(self.raw)

    def write_index(self, results: Sequence[Mapping[str, Any]]) -> list[str]:
        """The index of a sharded checkpoint: the raw one's bytes."""
        if self.weights.index:
            copy_named(self.raw, self.weights.index, self.staging.path)
        return [self.weights.index] if self.weights.index else []

    def abort(self) -> None:
        """Rank 0: remove the temporary folder."""
        self.staging.discard()


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


@contextmanager
def readable_errors(out: Path) -> Iterator[None]:
    """System errors as one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise QKGuardError(f"no space left for {out}; nothing was written; free some space") from error
        raise QKGuardError(f"cannot write {out}: {error.strerror} ({error.filename or 'data'})") from error
