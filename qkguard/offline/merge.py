"""Base files + adapter -> a full model, streamed: every tensor that changes is read, merged and written by itself.

The output is the base's files with patches, so what an adapter does not touch is the base byte for byte, and with it
the queries and keys that are left out. Memory: the adapter, one base tensor and its merged copy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Unpack

from qkguard.adapters.files import open_adapter
from qkguard.checkpoint.weights import WeightFolder, open_weights, resolve_folder
from qkguard.checkpoint.write import (
    BytesProgress,
    check_target,
    prepare,
    publish,
    write_files,
)
from qkguard.errors import QKGuardError
from qkguard.layout.model_code import import_model_code
from qkguard.layout.rows import RowOptions, RowSelection
from qkguard.layout.selection import select
from qkguard.offline.pair import folder_attention
from qkguard.offline.whole import refuse_incomplete


def merge_adapter(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keep_qk: bool = False,
    alpha: float = 1.0,
    spec: Any = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
    progress: BytesProgress | None = None,
    **rows: Unpack[RowOptions],
) -> dict[str, Any]:
    """Merge a LoRA adapter into its base model, with queries and keys left as they are in the base.

    Everything merged has the bits of PEFT's `merge_and_unload(safe_merge=True)` on a base held in its files' dtypes.

    Args:
        base: a folder or hub id, unquantised, in safetensors.
        adapter: a folder or hub id.
        out: the folder to write; it must not exist, or with `overwrite` be an earlier one of qkguard's.
        keep_qk: merge queries and keys too.
        alpha: 1 leaves queries and keys out, 0 merges them, between them LoRA's scaling is multiplied by 1 - alpha
            (for DoRA and trained copies: (1 - alpha) merged + alpha base, rounded once).
        spec: a layout by hand, for models that cannot be probed.
        trust_remote_code: allow the base's own model code to be imported.
        overwrite: replace an earlier folder.
        extra: further keys for the manifest.
        progress: called with (bytes done, bytes in all).
        rows: which rows are queries and keys, as the fields of `RowSelection`.

    Returns:
        The manifest, as written to `out/qkguard.json`.

    Raises:
        QKGuardError: bad input, an adapter that cannot be merged exactly, or a full disk; nothing is left behind.
    """
    if not 0.0 <= alpha <= 1.0:
        raise QKGuardError(f"Invalid alpha={alpha}: expected 0 (queries and keys merged) to 1 (left out).")
    if keep_qk and alpha != 1.0:
        raise QKGuardError(
            f"Queries and keys are merged whole by keep_qk, in part by alpha={alpha}: choose one of them."
        )
    chosen = RowSelection.of(rows)
    sources = [Path(folder) for folder in (base, adapter) if os.path.isdir(folder)]
    check_target(sources, Path(out), overwrite)
    opened_adapter = open_adapter(adapter)
    weights = mergeable_weights(base)
    specs = folder_attention(weights.folder, spec=spec, trust_remote_code=trust_remote_code)
    selection = select(specs, chosen)
    import_model_code("peft")
    from qkguard.offline.merge_plan import bind, describe_adapter, layer_drifts, note_unwritten, plan_merge

    merge = bind(
        weights,
        opened_adapter,
        selection,
        base_id=os.fspath(base),
        qk_share=1.0 if keep_qk else 1.0 - alpha,
        by_hand=spec is not None,
        trust_remote_code=trust_remote_code,
    )
    refuse_incomplete(weights, as_written=True, trust_remote_code=trust_remote_code)
    plan = plan_merge(merge, Path(out), chosen, overwrite=overwrite)
    with prepare(plan) as staging, ThreadPoolExecutor(1) as beside:
        unwritten = beside.submit(note_unwritten, merge)
        records = write_files(plan, staging.folder, progress=progress)
        unwritten.result()
        records[0]["layers"] = list(layer_drifts(merge))
        return publish(plan, staging, records, {"adapter": describe_adapter(merge.adapter), **(extra or {})})


def mergeable_weights(base: str | os.PathLike[str]) -> WeightFolder:
    """The weights of a base; QKGuardError where no adapter can be merged onto them: no safetensors, or quantised."""
    weights = open_weights(resolve_folder(base))
    for name in weights.where:
        if name.endswith("proj.weight"):
            weights.dtype(name)
    return weights
