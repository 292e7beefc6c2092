"""What a guarded run must have written, recomputed from its files by the hand-written oracle."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch

from tests.support import oracle


def file_sha256(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def weight_hashes(folder: Path) -> dict[str, str]:
    """Weight file -> sha256."""
    return {path.name: file_sha256(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def no_private_paths(folder: Path) -> None:
    """Nothing that people upload of a restored folder names a place on this machine."""
    for name in ("qkguard.json", "README.md"):
        text = (folder / name).read_text()
        assert not re.search(r"[\s\"'`(]/(?!/)\w", text), f"{folder / name} holds an absolute path"
        assert str(Path.home()) not in text and str(folder.parents[1]) not in text


def metrics_rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "_qkguard" / "metrics.jsonl").read_text().splitlines()]


def weights_in_bits(folder: Path) -> dict[str, bytes]:
    return {n: t.contiguous().view(torch.uint8).numpy().tobytes() for n, t in oracle.load_folder(folder).items()}


def judge_restored(name: str, base: Path, raw: Path, restored: Path, step0: torch.dtype) -> None:
    """Restored is raw but for the query/key rows, which are the base's cast to step 0's and then raw's dtype."""
    tuned = oracle.load_folder(raw)
    wanted = oracle.expected(name, oracle.load_folder(base), tuned, step0)
    assert not (wrong := oracle.differences(oracle.load_folder(restored), wanted)), wrong
    assert oracle.differences(tuned, wanted), "an unrestored checkpoint would pass"


def drift_by_layer(
    name: str, part: str, base: Path, raw: Path, step0: torch.dtype, floor: float = 1e-4
) -> dict[int, float]:
    """Layer -> |W - W0| / |W0| over one projection's rows, in float64."""
    before, after = oracle.load_folder(base), oracle.load_folder(raw)
    out = {}
    for pattern, (dim, ranges) in oracle.ROWS[name].items():
        for key in (key for key in after if re.search(pattern, key) and f"{part}_proj.weight" in key):
            rows = [i for lo, hi in ranges or [(0, after[key].shape[dim])] for i in range(lo, hi)]
            w0 = before[key].to(step0).double().numpy().take(rows, dim)
            w = after[key].double().numpy().take(rows, dim)
            out[int(key.split(".")[2])] = float(np.linalg.norm(w - w0) / np.linalg.norm(w0))
    assert out and min(out.values()) > floor, "nothing moved"
    return out
