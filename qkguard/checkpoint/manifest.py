"""`qkguard.json`: what a restored folder holds, how it was made, and the hashes that `verify` recomputes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

from qkguard.checkpoint.safetensors_io import read_header, sample_sha256
from qkguard.checkpoint.weights import opened
from qkguard.errors import QKGuardError

MANIFEST = "qkguard.json"
FORMAT = 1


def describe_file(path: Path) -> dict[str, Any]:
    """Size, header hash (None for a pickle) and sampled hash of a weight file."""
    with opened(path) as fd:
        size = os.fstat(fd).st_size
        sampled = sample_sha256(fd, size)
    header = read_header(path).sha256 if path.suffix == ".safetensors" else None
    return {"size": size, "header_sha256": header, "sample_sha256": sampled}


def build_manifest(
    *,
    raw: str,
    base: Mapping[str, Any],
    method: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    companions: Sequence[str],
    left_out: Sequence[str],
    partial: Sequence[str],
    warnings: Sequence[str],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest from the results of every file's job.

    Args:
        raw: path of the raw folder, relative to the restored one.
        base: what the source says of itself.
        method: its name and parameters.
        results: one record per weight file (`RestoredWrite.run`).
        companions, left_out: other files copied and not copied.
        partial: parameters with rows that feed keys and values alike and were left as tuned.
        warnings: sentences for people.
        extra: further top-level keys (step, probe results); its "warnings" and "nonfinite" are added to the others.
    """
    nonfinite = sorted({name for r in results for name in r["nonfinite"]} | set(extra.get("nonfinite", ())))
    sentences = [*warnings, *extra.get("warnings", ())]
    if nonfinite:
        sentences.append(
            f"the tuned weights hold NaN or Inf in {len(nonfinite)} tensor(s): {', '.join(nonfinite[:5])}"
            + (", ..." if len(nonfinite) > 5 else "")
        )
    if partial:
        sentences.append(
            f"partial: rows of {len(partial)} parameter(s) feed keys and values alike and stay tuned: "
            + ", ".join(partial[:5])
            + (", ..." if len(partial) > 5 else "")
        )
    layers = sorted((layer for r in results for layer in r["layers"]), key=lambda layer: layer["index"])
    tensors = sorted((tensor for r in results for tensor in r["tensors"]), key=lambda tensor: tensor["index"])
    manifest = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": dict(base),
        "raw": {"path": raw, "files": {r["file"]: r["raw"] for r in results if r["raw"]}},
        "method": dict(method),
        "partial": list(partial),
        "warnings": sentences,
        "nonfinite": nonfinite,
        "files": {r["target"]: r["restored"] | {"made": r["made"], "from": r["file"] or None} for r in results},
        "companions": list(companions),
        "left_out": list(left_out),
        "layers": [{k: v for k, v in layer.items() if k != "index"} for layer in layers],
        "tensors": [{k: v for k, v in tensor.items() if k != "index"} for tensor in tensors],
        "versions": versions(),
    }
    extra = {k: v for k, v in extra.items() if k not in ("warnings", "nonfinite")}
    if clash := sorted(set(extra) & set(manifest)):
        raise ValueError(f"extra manifest keys {clash} are taken")
    return manifest | extra


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
    return json.dumps(_finite(manifest), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a restored folder.

    Raises:
        QKGuardError: no such folder, no manifest (half-written, or not qkguard's), unreadable or of a newer format.
    """
    if not folder.is_dir():
        raise QKGuardError(f"no such folder: {folder}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        number = manifest["format"]
    except FileNotFoundError:
        raise QKGuardError(
            f"{folder} has no {MANIFEST}: it is incomplete or was not written by qkguard; restore it again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QKGuardError(f"{folder / MANIFEST} is not a readable manifest ({error}); restore it again") from None
    if number != FORMAT:
        raise QKGuardError(f"{folder / MANIFEST} has format {number}, this version reads {FORMAT}; update qkguard")
    return manifest
