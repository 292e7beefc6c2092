"""A point of a sweep, swapped into the loaded model and out again, against loading a checkpoint for it; one process.

    python -m pytest -m benchmark -s tests/benchmarks/bench_sweep.py
    python -m tests.benchmarks.bench_sweep [GIGABYTES]

Random bf16 llamas, the usual grid. What is measured at a point (recall, task quality) is the same either way and left
out, as is writing the checkpoint that would be loaded. Prints one line of JSON: seconds per point (the mean of the
grid, and of each method), seconds of a load (best of three, page cache warm) and their ratio.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

import pytest

from qkguard.choice.candidates import method_candidates
from qkguard.offline.models import LoadOptions, load_model
from qkguard.offline.pair import open_folders
from qkguard.offline.sweep_swap import CandidateSwap
from tests.benchmarks.bench_restore import build

GRID = "restore,restore:projections=k,qk-pro,interpolate"


def compare(gigabytes: float = 1.9) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("QKGUARD_BENCH_DIR")) as name:
        base, tuned = build(Path(name), gigabytes, "50GB")
        loads = []
        for _ in range(3):
            gc.collect()
            began = time.perf_counter()
            model = load_model(tuned, LoadOptions("auto", "cpu", False))
            loads.append(time.perf_counter() - began)
        swap = CandidateSwap(model, open_folders(base, tuned))
        points: dict[str, list[float]] = {}
        for candidate in method_candidates(GRID):
            began = time.perf_counter()
            rows = swap.prepare(candidate)
            with swap.swapped(rows):
                pass
            points.setdefault(candidate.method, []).append(time.perf_counter() - began)
    point = fmean(seconds for found in points.values() for seconds in found)
    return {
        "gigabytes": gigabytes,
        "points": sum(map(len, points.values())),
        "point_seconds": point,
        **{f"{method}_seconds": fmean(found) for method, found in points.items()},
        "load_seconds": min(loads),
        "ratio": point / min(loads),
    }


@pytest.mark.benchmark
def test_a_point_against_a_load() -> None:
    found = compare(0.05)
    print(json.dumps(found))
    assert found["point_seconds"] > 0 and found["points"] > 5


if __name__ == "__main__":
    print(json.dumps({key: round(value, 3) for key, value in compare(float((sys.argv[1:] or ["1.9"])[0])).items()}))
