"""A folder made from a checkpoint's files: link what stays, copy and patch what changes, publish it with one rename.

A `FolderPlan` says what changes in which file, and `write_folder` carries it out in one process. Ranks that share a
disk take the same three steps together: `prepare` on rank 0, `write_files` on every rank, `publish` on rank 0. None
of these is a collective: the caller keeps the ranks in step (`shares`), and the records of `write_files` are JSON
values.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from pathlib import Path
from threading import Lock
from typing import Any

from qkguard.checkpoint.card import model_card, read_card
from qkguard.checkpoint.copying import BytesCopied, Copies, FileCopy, Span, can_clone
from qkguard.checkpoint.files import auxiliary_files, copy_named, link_or_copy, write_text
from qkguard.checkpoint.manifest import MANIFEST, build_manifest, describe_base, describe_file, dump
from qkguard.checkpoint.safetensors_io import Header, TensorEntry, read_header, rename_tensors
from qkguard.checkpoint.staging import Staging
from qkguard.checkpoint.weights import WeightFolder
from qkguard.errors import QKGuardError

BytesProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

Record = dict[str, Any]
"""What the manifest will say of one weight file, in JSON values."""


@dataclass(frozen=True)
class OpenFile:
    """A copied weight file, open for patching, and where its tensors are; `source` is the raw folder's name for it."""

    name: str
    source: str
    fd: int
    tensors: Mapping[str, TensorEntry]


@dataclass(frozen=True)
class Patch:
    """A change to a copied file.

    Attributes:
        apply: overwrites something in an open file, on a thread of its own; returns lists for the record: "layers",
            "tensors", "nonfinite".
        start, stop: the bytes of the file between which it writes.
        whole: it overwrites every one of these bytes, so nobody needs to copy them.
    """

    apply: Callable[[OpenFile], Record]
    start: int
    stop: int
    whole: bool = False

    @classmethod
    def within(cls, entries: Iterable[TensorEntry], apply: Callable[[OpenFile], Record]) -> Patch:
        """A patch that changes some tensors of a file."""
        spans = [(entry.start, entry.stop) for entry in entries]
        return cls(apply, min(start for start, _ in spans), max(stop for _, stop in spans))


@dataclass(frozen=True)
class FilePlan:
    """One weight file of the new folder.

    Attributes:
        source: the raw folder's file that it is made from; None for a file that the raw folder lacks.
        target: its name in the new folder.
        nbytes: its size.
        patches: what changes in a copy of `source`.
        renamed: its tensors that get other names; without these and patches the file is linked.
        make: writes the file at a path, where there is no `source`; returns lists for the record, as a patch does.
    """

    source: str | None
    target: str
    nbytes: int
    patches: tuple[Patch, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    make: Callable[[Path], Record] | None = None

    @property
    def is_copied(self) -> bool:
        """Whether the new folder needs bytes of its own for it."""
        return bool(self.patches or self.renamed)

    @property
    def overwritten(self) -> list[Span]:
        """The bytes of `source` that patches overwrite whole."""
        return sorted((patch.start, patch.stop) for patch in self.patches if patch.whole)


@dataclass(frozen=True)
class FolderPlan:
    """A new folder: its weight files, what goes beside them, and what its manifest says.

    Attributes:
        weights: the raw folder's weights, opened; never changed.
        out: the folder to appear, complete or not at all.
        files: the weight files, most work first, so that dealing them out to ranks balances it.
        at_once: how many patches may be at work at the same time; each needs memory for what it changes.
        base, method: for the manifest: where the rows come from, and the method with its options.
        partial: for the manifest: parameters with rows that feed keys and values alike and stay tuned.
        warnings: for the manifest: sentences for people.
        other_files: files beside those that travel with the raw weights, or in their place: name -> a file to copy,
            or the text to write.
        cards: folders whose model card lends its metadata; the first that has one counts.
        staging: assemble in this folder instead of beside `out`, where a rename reaches `out` from it; needed where
            a background upload watches the folder around `out`.
        overwrite: replace an earlier folder of qkguard's at `out`.
    """

    weights: WeightFolder
    out: Path
    files: tuple[FilePlan, ...]
    base: Mapping[str, Any]
    method: Mapping[str, Any]
    at_once: int = 1
    partial: Sequence[str] = ()
    warnings: Sequence[str] = ()
    other_files: Mapping[str, Path | str] = field(default_factory=dict)
    cards: Sequence[Path] = ()
    staging: Path | None = None
    overwrite: bool = False


def plan_files(
    weights: WeightFolder, patches: Mapping[str, Sequence[Patch]], renamed: Mapping[str, str] | None = None
) -> tuple[FilePlan, ...]:
    """A plan for every file of a folder from the patches in it; files that are only linked come last.

    Args:
        weights: the raw folder.
        patches: file -> what changes in it.
        renamed: tensor name -> its shorter name in the new folder, where that is another one.
    """
    plans = []
    for file, header in weights.files.items():
        names = {name: new for name, new in (renamed or {}).items() if weights.where[name] == file}
        plans.append(FilePlan(file, file, header.size, tuple(patches.get(file, ())), names))
    return tuple(sorted(plans, key=_work_first))


def _work_first(file: FilePlan) -> tuple[int, str]:
    return (-file.nbytes if file.is_copied else 0, file.target)


def write_folder(
    plan: FolderPlan, extra: Mapping[str, Any] | None = None, progress: BytesProgress | None = None
) -> dict[str, Any]:
    """Carry out a plan in one process; nothing is left behind after an error.

    Args:
        plan: what to write.
        extra: further keys for the manifest, as for `publish`.
        progress: called with (bytes done, bytes in all).

    Returns:
        The manifest, as written to `plan.out/qkguard.json`.
    """
    with prepare(plan) as staging:
        return publish(plan, staging, write_files(plan, staging.folder, progress=progress), extra)


def prepare(plan: FolderPlan, staging: Staging | None = None) -> Staging:
    """Rank 0: check the target and the space, make the temporary folder, unless there is one (`ahead.HeadStart`).

    Raises:
        QKGuardError: a target that is taken, too little space, or another process at work on the same target.
    """
    check_target([plan.weights.folder], plan.out, plan.overwrite)
    if staging is not None:
        return staging
    with readable_errors(plan.out):
        staging = Staging(plan.out, plan.staging)
        try:
            _check_space(plan, staging.folder)
        except BaseException:
            staging.discard()
            raise
    return staging


def _check_space(plan: FolderPlan, folder: Path) -> None:
    raw = plan.weights.folder
    same_disk = folder.stat().st_dev == raw.stat().st_dev
    need = sum(file.nbytes for file in plan.files if file.is_copied or file.make or not same_disk)
    free = shutil.disk_usage(folder).free
    if need > free and not can_clone(raw / next(iter(plan.weights.files)), folder):
        raise QKGuardError(
            f"There is not enough space for {plan.out}: {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free. Free "
            "some, or choose another disk."
        )


def write_files(
    plan: FolderPlan,
    folder: Path,
    rank: int = 0,
    world: int = 1,
    progress: BytesProgress | None = None,
    ahead: Copies | None = None,
) -> list[Record]:
    """Write every `world`-th weight file of the plan, from the `rank`-th on, after `prepare`; no collective.

    Args:
        plan: what to write.
        folder: that of the staging that `prepare` made.
        rank, world: which part of the files.
        progress: called with (bytes done, bytes in all), from any thread.
        ahead: copies from the raw folder to `folder` that were started before the plan was known.

    Returns:
        A record of each file written, for `publish`.
    """
    files = plan.files[rank::world]
    written = _Counter(sum(file.nbytes for file in files), progress)
    with ExitStack() as stack:
        stack.enter_context(readable_errors(plan.out))
        copies = ahead or stack.enter_context(Copies(plan.weights.folder, folder))
        copies.tell(written)
        # Reading, hashing and sums release the interpreter's lock, so patches run beside each other and the copying
        patching = ThreadPoolExecutor(max(1, plan.at_once // world))
        stack.callback(patching.shutdown, cancel_futures=True)
        stack.callback(copies.cancel)  # after an error no patch waits for bytes to come; without one all are there
        records = []
        for number, file in enumerate(files):
            for near in files[number : number + 2]:  # the next file is copied while this one is patched
                if near.source is not None and near.is_copied:
                    copies.start(near.source, near.target, near.overwritten)
            records.append(_write_file(plan.weights, file, folder, copies, patching, written))
        copies.settle()
        return records


class _Counter:
    """Adds up the bytes that several threads have written; a file copied ahead for nothing is not counted twice."""

    def __init__(self, total: int, progress: BytesProgress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self._lock = Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self.done += count
            if self.progress:
                self.progress(min(self.done, self.total), self.total)


def _write_file(
    weights: WeightFolder, file: FilePlan, folder: Path, copies: Copies, pool: Executor, written: BytesCopied
) -> Record:
    target = folder / file.target
    target.parent.mkdir(parents=True, exist_ok=True)
    record: Record = {"file": file.target, "from": file.source, "layers": [], "tensors": [], "nonfinite": []}
    if file.source is None:
        assert file.make is not None
        record |= file.make(target)
        written(file.nbytes)
        return record | {"made": "added", "raw": None, "written": describe_file(target, read_header(target))}
    source, header = weights.folder / file.source, weights.files[file.source]
    record["raw"] = describe_file(source, header)
    if not file.is_copied:
        copies.drop(file.source)
        linked = link_or_copy(source, target)
        written(file.nbytes)
        return record | {"made": "linked" if linked else "copied", "written": record["raw"]}
    copy = copies.take(file.source)
    if copy.target != target:  # begun before its name was known (`ahead`)
        copy.rename(target)
    for found in _patched(copy, file, header, pool, written):
        for key, entries in found.items():
            record[key] += entries
    copy.wait(file.nbytes)
    if file.renamed:
        rename_tensors(copy.fd, file.renamed)
        _name_anew(record["tensors"], file.renamed)
        header = read_header(target)
    described = describe_file(target, header)
    copies.finish(copy)
    return record | {"made": "patched" if file.patches else "renamed", "written": described}


def _patched(copy: FileCopy, file: FilePlan, header: Header, pool: Executor, written: BytesCopied) -> Iterator[Record]:
    """What the patches of a file say, in their order; each runs when what it changes is copied.

    What lies before everything still to be patched is handed to the disk, so that no page is written twice.
    """

    def apply(patch: Patch) -> Record:
        copy.wait(patch.stop)
        return patch.apply(target)

    patches = sorted(file.patches, key=attrgetter("stop"))
    target = OpenFile(file.target, str(file.source), copy.fd, header.tensors)
    running = [pool.submit(apply, patch) for patch in patches]
    starts = [patch.start for patch in patches] + [file.nbytes]
    for number, (patch, found) in enumerate(zip(patches, running, strict=True), 1):
        yield found.result()
        copy.write_out(min(starts[number:]))
        written(patch.stop - patch.start if patch.whole else 0)  # whoever follows may end the write here


def _name_anew(tensors: list[dict[str, Any]], renamed: Mapping[str, str]) -> None:
    """The manifest's entries of patched tensors, under the names they are written by."""
    for tensor in tensors:
        if tensor["name"] in renamed:
            tensor["raw_name"] = tensor["name"]
            tensor["name"] = renamed[tensor["name"]]


def publish(
    plan: FolderPlan, staging: Staging, records: Sequence[Record], extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Rank 0: `complete` the folder and rename it into place; returns the manifest."""
    manifest = complete(plan, staging, records, extra)
    with readable_errors(plan.out):
        staging.publish(replace=plan.overwrite)
    return manifest


def complete(
    plan: FolderPlan, staging: Staging, records: Sequence[Record], extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Rank 0: add the other files, and the manifest last: all but the rename.

    Args:
        plan: what was written.
        staging: from `prepare`.
        records: everybody's, from `write_files`.
        extra: further top-level keys for the manifest (step, probe results); its "warnings" and "nonfinite" (names of
            tensors with NaN or Inf) are added to those found while writing.

    Returns:
        The manifest.

    Raises:
        QKGuardError: a weight file without a record, or an error of the disk.
    """
    if sorted(record["file"] for record in records) != sorted(file.target for file in plan.files):
        raise QKGuardError(f"{plan.out}: not every weight file was written, so nothing is published.")
    with readable_errors(plan.out):
        auxiliary, left_out = _write_other_files(plan, staging.folder)
        manifest = build_manifest(
            raw=os.path.relpath(plan.weights.folder.resolve(), plan.out.resolve()),
            base=describe_base(plan.base, plan.out),
            method=plan.method,
            records=sorted(records, key=itemgetter("file")),
            auxiliary=auxiliary,
            left_out=left_out,
            partial=plan.partial,
            warnings=plan.warnings,
            extra=extra or {},
        )
        cards = [read_card(folder) for folder in (*plan.cards, plan.weights.folder)]
        write_text(staging.folder / "README.md", model_card(manifest, next(filter(None, cards), None)))
        write_text(staging.folder / MANIFEST, dump(manifest))
        staging.sync()
    return json.loads(dump(manifest))


def _write_other_files(plan: FolderPlan, folder: Path) -> tuple[list[str], list[str]]:
    """(names written, names in the raw folder left out)."""
    raw, index = plan.weights.folder, plan.weights.index
    taken, left_out = auxiliary_files(raw)
    files: dict[str, Path | str] = {name: raw / name for name in [*taken, *([index] if index else [])]}
    renamed = {name: new for file in plan.files for name, new in file.renamed.items()}
    if index and renamed:
        files[index] = _renamed_index(raw / index, renamed)
    files |= plan.other_files
    for name, content in files.items():
        if isinstance(content, str):
            write_text(folder / name, content)
        else:
            copy_named(content, folder / name)
    return list(files), [name for name in left_out if name not in plan.weights.files and name not in files]


def _renamed_index(path: Path, renamed: Mapping[str, str]) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    content["weight_map"] = {renamed.get(name, name): file for name, file in content["weight_map"].items()}
    return json.dumps(content, indent=2) + "\n"


def check_target(sources: Sequence[Path], out: Path, overwrite: bool) -> None:
    """Refuse a target folder that is taken, or that is or holds what it is made from."""
    for source in sources:
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise QKGuardError(f"{out} is or contains a folder it is made from ({source}). Choose another one.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise QKGuardError(f"{out} exists. Remove it, choose another folder, or overwrite it (--overwrite).")
        if not (out / MANIFEST).is_file():
            raise QKGuardError(f"{out} exists and was not written by qkguard. Remove it yourself.")


@contextmanager
def readable_errors(out: Path) -> Iterator[None]:
    """System errors as one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise QKGuardError(f"There is no space left for {out}; nothing was written. Free some space.") from error
        raise QKGuardError(f"Cannot write {out}: {error.strerror} ({error.filename or 'data'}).") from error
