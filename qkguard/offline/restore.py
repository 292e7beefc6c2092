"""Two checkpoints that exist already: what `qkguard restore` does, through the same files code as the callback."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Unpack

from qkguard.checkpoint.ahead import HeadStart
from qkguard.checkpoint.carried import with_carried
from qkguard.checkpoint.restored import plan_restored
from qkguard.checkpoint.staging import working_folder
from qkguard.checkpoint.weights import NonfiniteScan
from qkguard.checkpoint.write import BytesProgress, check_target, prepare, publish, write_files
from qkguard.errors import QKGuardError, RearrangedError, current_names
from qkguard.layout.rows import RETRIEVAL, RowOptions, RowSelection
from qkguard.layout.selection import select
from qkguard.offline.missing import describe_lost, lost_tensors
from qkguard.offline.pair import Folders, Pair, find_pair, folder_attention, open_folders, pair_warnings
from qkguard.offline.whole import refuse_incomplete
from qkguard.probe.retrieval import RetrievalChoice
from qkguard.restore.registry import check_options, get_method


def restore_checkpoint(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: str = "restore",
    ridge: float = 10.0,
    alpha: float = 1.0,
    align: bool = False,
    per_layer: Mapping[int, float] | None = None,
    spec: Any = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    carry_missing: bool = False,
    extra: Mapping[str, Any] | None = None,
    progress: BytesProgress | None = None,
    **rows: Unpack[RowOptions],
) -> dict[str, Any]:
    """Write the tuned checkpoint with the base's queries and keys to a new folder, in bounded memory.

    Args:
        base: the checkpoint before SFT: a folder, or a hub id whose safetensors the hub or its cache has.
        tuned: the one after it, likewise.
        out: the folder to write; it must not exist, or with `overwrite` be an earlier restored one.
        method: a restore method: restore, qk-pro, procrustes or interpolate.
        ridge: of qk-pro: 0 is restore, larger keeps more of the tuned queries, in units of the mean eigenvalue of the
            keys' Gram matrix.
        alpha: of interpolate: from 0 (tuned) to 1 (before SFT).
        align: of interpolate: first rotate the base's queries and keys towards the tuned ones.
        per_layer: ridge or alpha of single layers, in place of the common one.
        spec: a layout by hand, for models that cannot be probed.
        device: where the arithmetic of methods beyond copying runs ("cuda"); one layer is in memory at a time.
        trust_remote_code: allow the checkpoints' own model code to be imported.
        overwrite: replace an earlier restored folder at `out`.
        carry_missing: copy tensors that the base has and the tuned checkpoint lost (multi-token-prediction layers),
            into files of their own; without it they are named in a warning.
        extra: further keys for the manifest.
        progress: called with (bytes done, bytes in all).
        rows: which rows, as the fields of `RowSelection`: projections, layers, include_norms, include_sliding_window,
            shared. layers="retrieval" takes the choice of the guarded run around `tuned`, where that made one.

    Tensor names that a wrapper left its mark in (`_orig_mod.`, `module.`, `base_model.model.`) are written as
    from_pretrained loads them.

    Returns:
        The manifest, as written to `out/qkguard.json`: for every layer what the method did, among it "fallback" where
        it could not be applied.

    Raises:
        QKGuardError: bad input or a full disk; nothing is left behind.
    """
    target = Path(out)
    check_target([Path(folder) for folder in (base, tuned) if os.path.isdir(folder)], target, overwrite)
    given: dict[str, Any] = current_names(rows)
    chosen_by_run = None
    if given.get("layers") == RETRIEVAL:
        from qkguard.offline.retrieval import choice_of_run  # imports torch, which copying rows does without

        chosen_by_run = choice_of_run(tuned)
        given |= {} if chosen_by_run is None else {"layers": chosen_by_run.layers}
    per_layer = given.pop("per_layer", per_layer)  # under its old name
    chosen = RowSelection.of(given)
    options = {"ridge": ridge, "alpha": alpha, "align": align, "per_layer": per_layer}
    options = check_options(method, options, chosen.projections)
    folders = open_folders(base, tuned)
    with NonfiniteScan(folders.tuned) as scan, HeadStart(folders.tuned, target) as ahead, ExitStack() as cleanup:
        how: dict[str, Any] = {"spec": spec, "trust_remote_code": trust_remote_code, "before_import": ahead.begin}
        try:
            pair = find_pair(folders, rows=chosen, gains=get_method(method).needs_gains(options), **how)
        except RearrangedError as error:
            if method != "restore":
                raise QKGuardError(
                    f"{error}, or use method restore, which goes through transformers by itself."
                ) from None
            work = cleanup.enter_context(working_folder(target.parent))
            pair = _through_transformers(folders, work, chosen, trust_remote_code)
        refuse_incomplete(folders.tuned, as_written=True, trust_remote_code=trust_remote_code)
        lost = lost_tensors(folders, trust_remote_code=trust_remote_code, before_import=ahead.begin)
        plan = plan_restored(
            pair.weights,
            target,
            pair.selection,
            pair.names,
            pair.base,
            method=method,
            options=options,
            rows=chosen,
            device=device,
            overwrite=overwrite,
        )
        if carry_missing and lost:
            first = next(iter(pair.names.values()))
            plan = with_carried(plan, folders.base, lost, folders.tuned.dtype(first))
        warnings = [*pair.warnings, *describe_lost(lost, folders, carried=carry_missing)]
        with prepare(plan, ahead.staging) as staging:
            records = write_files(plan, staging.folder, progress=progress, ahead=ahead.copies)
            found = {"warnings": warnings, "nonfinite": scan.result(), **_told(chosen_by_run, warnings)}
            return publish(plan, staging, records, {**(extra or {}), **found})


def _told(choice: RetrievalChoice | None, warnings: Sequence[str]) -> dict[str, Any]:
    """What the manifest says of a choice of layers, and a warning where it is of all."""
    if choice is None:
        return {}
    return {"retrieval": choice.summary(), "warnings": [*warnings, *([] if choice.layers else [choice.words])]}


def _through_transformers(folders: Folders, work: Path, rows: RowSelection, trust_remote_code: bool) -> Pair:
    """`find_pair` where tensors are cut or joined on loading (`checkpoint.rearranged`)."""
    from qkguard.offline.rearranged import selection_on_disk

    specs = folder_attention(folders.tuned.folder, trust_remote_code=trust_remote_code)
    selection, saved = selection_on_disk(
        folders.base,
        folders.tuned,
        select(specs, rows),
        work,
        base_id=folders.base_id,
        trust_remote_code=trust_remote_code,
    )
    warning = "transformers cuts or joins tensors of this model, so it was loaded and saved to find the rows"
    return Pair(folders.tuned, specs, selection, saved.names, saved, [*pair_warnings(folders), warning])
