"""Is a restored adapter still what its manifest says, and is the raw one still what it was made from?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qkguard.adapters.files import ADAPTER_TENSORS, PREFIX, loadable_name, open_adapter, scale_rows
from qkguard.arrays import same_bits
from qkguard.checkpoint.manifest import describe_file
from qkguard.errors import QKGuardError


def verify_adapter(folder: Path, manifest: Mapping[str, Any], *, raw: bool = True) -> dict[str, Any]:
    """Check a restored adapter against its manifest and, where it still exists, the adapter it was made from."""
    for name in manifest["companions"]:
        if not (folder / name).is_file():
            raise QKGuardError(f"{folder} lacks {name}, which it was written with. Restore it again.")
    adapter = open_adapter(folder, merging=False)
    if describe_file(folder / ADAPTER_TENSORS, adapter.header) != manifest["files"][ADAPTER_TENSORS]:
        raise QKGuardError(f"{folder / ADAPTER_TENSORS} differs from what its manifest records. Restore it again.")
    found, state = folder / manifest["raw"]["path"], "not found" if raw else "not checked"
    if raw and (found / ADAPTER_TENSORS).is_file():
        trained = open_adapter(found, merging=False)
        if describe_file(found / ADAPTER_TENSORS, trained.header) != manifest["raw"]["files"][ADAPTER_TENSORS]:
            raise QKGuardError(
                f"{found / ADAPTER_TENSORS}: the raw adapter has changed since. Restore it again, or leave it out "
                "(--no-raw) if it may."
            )
        _compare(adapter.arrays(), trained.arrays(), manifest, folder)
        state = "unchanged"
    return {
        "folder": str(folder),
        "base": manifest["base"].get("id"),
        "method": manifest["method"]["name"],
        "layers": len(manifest["removed"]) + len(manifest["rows"]) + len(manifest["scaled"]),
        "tensors": len(adapter.shapes),
        "restored_bytes": manifest["files"][ADAPTER_TENSORS]["size"],
        "files": 1,
        "raw": state,
        "compared": "every tensor",
        "partial": [],
        "warnings": manifest["warnings"],
    }


def _compare(
    ours: dict[str, np.ndarray], raw: dict[str, np.ndarray], manifest: Mapping[str, Any], folder: Path
) -> None:
    gone = tuple(f"{PREFIX}{module}.lora_" for module in manifest["removed"])
    rows = {entry["tensor"]: entry for entry in manifest["rows"]}
    for key, tensor in raw.items():
        found = ours.get(loadable_name(key))
        if key.startswith(gone):
            as_recorded = found is None
        else:
            entry = rows.get(key)
            wanted = scale_rows(tensor, entry["ranges"], entry["factor"]) if entry else tensor
            as_recorded = found is not None and same_bits(found, wanted)
        if not as_recorded:
            raise QKGuardError(f"{folder}: {key} is not what its manifest says it is. Restore it again.")
