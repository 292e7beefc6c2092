"""The same restored model a second time: `final/` after the last checkpoint. Its files are linked, not made again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkguard.checkpoint.files import link_or_copy
from qkguard.checkpoint.manifest import describe_base, describe_file, dump, load_manifest
from qkguard.checkpoint.safetensors_io import read_header
from qkguard.checkpoint.staging import Staging
from qkguard.checkpoint.write import FolderPlan, Record, complete, readable_errors
from qkguard.errors import QKGuardError


def records_of(made: Path, plan: FolderPlan) -> list[Record] | None:
    """The records that `write_files` would make of a plan, read from a folder that an equal plan has made.

    Equal are the rows before SFT, the method with its options, and the raw files by their sampled hashes; the folder's
    own files are those of its manifest. None where anything differs, or the folder is not there.
    """
    try:
        manifest = load_manifest(made)
        settings = {"base": describe_base(plan.base, made), "method": plan.method, "partial": plan.partial}
        same_settings = all(manifest[key] == wanted for key, wanted in json.loads(dump(settings)).items())
        names = sorted(file.target for file in plan.files)
        if not same_settings or sorted(manifest["files"]) != names or any(file.make for file in plan.files):
            return None
        raw = {name: describe_file(plan.weights.folder / name, header) for name, header in plan.weights.files.items()}
        if manifest["raw"]["files"] != raw or not all(
            _is_as_written(made / name, manifest["files"][name]) for name in names
        ):
            return None
    except (QKGuardError, OSError, KeyError, TypeError):
        return None
    return _records(manifest)


def _is_as_written(path: Path, entry: Mapping[str, Any]) -> bool:
    found = describe_file(path, read_header(path))
    return all(entry[key] == value for key, value in found.items())


def _records(manifest: Mapping[str, Any]) -> list[Record]:
    """The inverse of `build_manifest`: all layers and tensors in the first file's record, in their order."""
    records: list[Record] = []
    for name, entry in sorted(manifest["files"].items()):
        written = {key: value for key, value in entry.items() if key not in ("made", "from")}
        raw = manifest["raw"]["files"].get(entry["from"])
        record = {"file": name, "from": entry["from"], "made": entry["made"], "raw": raw, "written": written}
        records.append(record | {"layers": [], "tensors": [], "nonfinite": []})
    for key in ("layers", "tensors"):
        records[0][key] = [entry | {"index": index} for index, entry in enumerate(manifest[key])]
    records[0]["nonfinite"] = list(manifest["nonfinite"])
    return records


def link_together(
    made: Path, plan: FolderPlan, staging: Staging, records: list[Record], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Link the files of `made`, of which `records_of` says that they are the plan's, and complete the folder.

    Returns:
        The manifest. After an error the temporary folder is gone.
    """
    try:
        with readable_errors(plan.out):
            for file in plan.files:
                target = staging.folder / file.target
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(made / file.target, target)
        return complete(plan, staging, records, extra)
    except BaseException:
        staging.discard()
        raise
