"""`qkguard.json`: what a restored folder holds, how it was made, and the hashes that `verify` recomputes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from operator import itemgetter
from pathlib import Path
from typing import Any

from qkguard.checkpoint.safetensors_io import Header, opened, sample_sha256
from qkguard.errors import QKGuardError

MANIFEST = "qkguard.json"
FORMAT = 1


def describe_file(path: Path, header: Header) -> dict[str, Any]:
    """Size, header hash and sampled hash of a weight file whose header was read before."""
    with opened(path) as fd:
        size = os.fstat(fd).st_size
        return {"size": size, "header_sha256": header.sha256, "sample_sha256": sample_sha256(fd, size)}


def public_name(model: str) -> str:
    """A hub id as it is, of a local folder the last part: manifests and cards are uploaded, paths are private."""
    return Path(model).resolve().name if os.path.isabs(model) or os.path.exists(model) else model


def describe_base(base: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """What the manifest in `out` says of the base (`BaseRows.describe`): no absolute path of this machine."""
    described = dict(base)
    if "id" in base:
        described["id"] = public_name(str(base["id"]))
    if "reference" in base:
        described["reference"] = os.path.relpath(Path(base["reference"]).resolve(), out.resolve())
    return described


def reference_of(folder: Path) -> Path | None:
    """The file with the rows before SFT that the restored model in `folder` was made with, if its manifest names one.

    Raises:
        QKGuardError: no manifest, or none that can be read.
    """
    named = load_manifest(folder)["base"].get("reference")
    return None if named is None else (folder / named).resolve()


def build_manifest(
    *,
    raw: str,
    base: Mapping[str, Any],
    method: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    auxiliary: Sequence[str],
    left_out: Sequence[str],
    partial: Sequence[str],
    warnings: Sequence[str],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest from the records of every weight file.

    Args:
        raw: path of the raw folder, relative to the new one.
        base: what is said of the base (`describe_base`).
        method: its name and options.
        records: one per weight file (`write_files`).
        auxiliary, left_out: other files copied and not copied.
        partial: parameters with rows that feed keys and values alike and were left as tuned.
        warnings: sentences for people.
        extra: further top-level keys (step, probe results); its "warnings" and "nonfinite" are added to the others.
    """
    nonfinite = sorted({name for r in records for name in r["nonfinite"]} | set(extra.get("nonfinite", ())))
    layers = _in_order(records, "layers")
    sentences = [*warnings, *fallback_warnings(str(method["name"]), layers), *extra.get("warnings", ())]
    if nonfinite:
        sentences.append(f"the tuned weights hold NaN or Inf in {len(nonfinite)} tensor(s): {_first(nonfinite)}")
    if partial:
        sentences.append(
            f"partial: rows of {len(partial)} parameter(s) feed keys and values alike and stay tuned: "
            + _first(partial)
        )
    manifest = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": dict(base),
        "raw": {"path": raw, "files": {r["from"]: r["raw"] for r in records if r["raw"]}},
        "method": dict(method),
        "partial": list(partial),
        "warnings": sentences,
        "nonfinite": nonfinite,
        "files": {r["file"]: r["written"] | {"made": r["made"], "from": r["from"]} for r in records},
        "companions": list(auxiliary),
        "left_out": list(left_out),
        "layers": layers,
        "tensors": _in_order(records, "tensors"),
        "versions": versions(),
    }
    extra = {k: v for k, v in extra.items() if k not in ("warnings", "nonfinite")}
    clash = sorted(set(extra) & set(manifest))
    if clash:
        raise ValueError(f"extra manifest keys {clash} are taken")
    carried = [entry for record in records for entry in record.get("carried", ())]
    return manifest | ({"carried": carried} if carried else {}) | extra


def _in_order(records: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """The layers' or tensors' entries of all records, sorted by their index, without it."""
    entries = sorted((entry for record in records for entry in record[key]), key=itemgetter("index"))
    return [{name: value for name, value in entry.items() if name != "index"} for entry in entries]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def fallback_warnings(method: str, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each reason for which a method did less than its name says, with the layers concerned."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if "fallback" in layer:
            found.setdefault(layer["fallback"], []).append(str(layer["layer"]))
    return [f"{method} fell back in layer(s) {', '.join(where)} to {what}" for what, where in found.items()]


def versions() -> dict[str, str]:
    """Versions of the libraries that had a hand in it, without importing them."""
    out = {}
    for name in ("qkguard", "torch", "transformers", "safetensors", "trl", "peft", "accelerate", "deepspeed"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def dump(manifest: Mapping[str, Any]) -> str:
    """JSON text; NaN and Inf, which JSON lacks, become null."""
    return json.dumps(finite(manifest), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A JSON value with None in the place of NaN and Inf, which JSON lacks."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a restored folder.

    Raises:
        QKGuardError: no such folder, no manifest (half-written, or not qkguard's), unreadable or of a newer format.
    """
    if not folder.is_dir():
        raise QKGuardError(f"There is no such folder: {folder}.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        number = manifest["format"]
    except FileNotFoundError:
        raise QKGuardError(
            f"{folder} has no {MANIFEST}: it is incomplete or was not written by qkguard. Restore it again."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QKGuardError(f"{folder / MANIFEST} is not a readable manifest ({error}). Restore it again.") from None
    if number != FORMAT:
        raise QKGuardError(f"{folder / MANIFEST} has format {number}, this version reads {FORMAT}. Update qkguard.")
    return manifest
