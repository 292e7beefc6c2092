"""A point of a sweep, swapped into the loaded model and out again, against writing its checkpoint and loading that.

    OMP_WAIT_POLICY=passive python -m pytest -m benchmark -s tests/benchmarks/bench_sweep.py
    OMP_WAIT_POLICY=passive python -m tests.benchmarks.bench_sweep [GIGABYTES]

Random bf16 llamas, the usual grid, one process, set up as `qkguard sweep` sets itself up. Both sides make the same
rows, and both end with the model that is measured in memory. What is measured of it (recall, task quality) is the
same either way and left out. Prints one line of JSON: seconds per point (the mean of the grid, and of each method),
seconds of `restore_checkpoint` and a load, the ratio of the two for the grid and for each method, and seconds of the
load alone with its ratio to a point of `restore`, which reads and writes queries and keys and computes nothing. Page
cache warm; a load is over when every page of the file, which is mapped, was looked at.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

import pytest
from torch import nn

from qkguard.choice.candidates import Candidate, method_candidates
from qkguard.cli.output import keep_freed_memory
from qkguard.offline.models import LoadOptions, load_model
from qkguard.offline.pair import Folders, open_folders
from qkguard.offline.restore import restore_checkpoint
from qkguard.offline.sweep_swap import CandidateSwap
from tests.benchmarks.bench_restore import build

GRID = "restore,restore:projections=k,qk-pro,interpolate"
PAGE = 4096


def load(folder: Path) -> nn.Module:
    model = load_model(folder, LoadOptions("auto", "cpu", False))
    for param in model.parameters():
        flat = param.data.view(-1)
        flat[:: PAGE // flat.itemsize].sum()
    return model


def seconds_of_point(swap: CandidateSwap, candidate: Candidate) -> float:
    began = time.perf_counter()
    rows = swap.prepare(candidate)
    assert rows.digest
    with swap.swapped(rows):
        pass
    return time.perf_counter() - began


def seconds_of_checkpoint(folders: Folders, candidate: Candidate, out: Path) -> tuple[float, float]:
    """Seconds of writing a candidate's checkpoint and loading it, and of the load alone."""
    gc.collect()
    began = time.perf_counter()
    options = dict(candidate.options)
    given = {"method": candidate.method, "projections": candidate.tensors, **options}
    restore_checkpoint(folders.base.folder, folders.tuned.folder, out, **given)
    written = time.perf_counter()
    load(out)
    done = time.perf_counter()
    shutil.rmtree(out)
    return done - began, done - written


def compare(gigabytes: float = 1.9) -> dict[str, float]:
    """Every candidate in turn, both ways."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=os.environ.get("QKGUARD_BENCH_DIR")) as name:
        base, tuned = build(Path(name), gigabytes, "50GB")
        folders = open_folders(base, tuned)
        swap = CandidateSwap(load(tuned), folders)
        seconds_of_checkpoint(folders, method_candidates("restore")[0], Path(name) / "out")  # finds the layout
        points: dict[str, list[float]] = {}
        checkpoints: dict[str, list[float]] = {}
        loads = []
        for candidate in method_candidates(GRID):
            points.setdefault(candidate.method, []).append(seconds_of_point(swap, candidate))
            both, alone = seconds_of_checkpoint(folders, candidate, Path(name) / "out")
            checkpoints.setdefault(candidate.method, []).append(both)
            loads.append(alone)
    point, checkpoint = (fmean(x for found in side.values() for x in found) for side in (points, checkpoints))
    return {
        "gigabytes": gigabytes,
        "points": len(loads),
        "point_seconds": point,
        **{f"{method}_seconds": fmean(found) for method, found in points.items()},
        "checkpoint_seconds": checkpoint,
        "ratio": point / checkpoint,
        **{f"{method}_ratio": fmean(found) / fmean(checkpoints[method]) for method, found in points.items()},
        "load_seconds": min(loads),
        "restore_to_load": fmean(points["restore"]) / min(loads),
    }


@pytest.mark.benchmark
@pytest.mark.timeout(600)
def test_a_point_against_a_checkpoint() -> None:
    found = compare(0.05)
    print(json.dumps(found))
    assert 0 < found["ratio"] < 1 and found["points"] > 5


if __name__ == "__main__":
    print(json.dumps({key: round(value, 3) for key, value in compare(float((sys.argv[1:] or ["1.9"])[0])).items()}))
