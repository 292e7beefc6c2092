"""`qkguard merge` against PEFT's `merge_and_unload` and `save_pretrained`, in fresh processes: time and peak memory.

    python -m pytest -m benchmark -s tests/benchmarks/bench_merge.py
    python -m tests.benchmarks.bench_merge [GIGABYTES] [--repeat 2]

A random bf16 llama and a LoRA of rank 16 on all its linear layers. Both merge queries and keys too (`--keep-qk`), so
that both do the same work, and leave everything on the disk. Prints one line of JSON: the best seconds of each, by the
clock and of processor time, the most memory of each, and their ratios. qkguard also with queries and keys left out,
which is what it is for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.benchmarks.bench_restore import build
from tests.benchmarks.measuring import Took, timed

PEFT = """
import os, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
os.sync()
"""


def build_adapted(folder: Path, gigabytes: float) -> None:
    """A base, and an adapter with random factors."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, tuned = build(folder, gigabytes, "50GB")
    shutil.rmtree(tuned)
    config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, config).save_pretrained(folder / "adapter")


def compare(gigabytes: float = 1.9, repeat: int = 2) -> dict[str, float]:
    """Page cache warm, the layout known, the two in turn."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("QKGUARD_BENCH_DIR")) as name:
        folder = Path(name)
        # In its own process: the builder's memory is not the benchmark's.
        subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.bench_merge", "--build", name, str(gigabytes)], check=True
        )
        base, adapter, out = (str(folder / part) for part in ("base", "adapter", "out"))
        merge = [sys.executable, "-m", "qkguard", "merge", "-b", base, "-a", adapter, "-o", out, "--json"]
        commands = {
            "peft": [sys.executable, "-c", PEFT, base, adapter, out],
            "merge": [*merge, "--keep-qk"],
            "without_qk": merge,
        }
        runs: dict[str, list[Took]] = {kind: [] for kind in commands}
        for _ in range(repeat):
            for kind, command in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                runs[kind].append(timed(command))
        size = sum(file.stat().st_size for file in Path(base).iterdir())
    best = {kind: min(took.seconds for took in found) for kind, found in runs.items()}
    cpu = {kind: min(took.cpu for took in found) for kind, found in runs.items()}
    most = {kind: max(took.megabytes for took in found) for kind, found in runs.items()}
    return {
        "gigabytes": size / 1e9,
        **{f"{kind}_seconds": seconds for kind, seconds in best.items()},
        **{f"{kind}_cpu_seconds": seconds for kind, seconds in cpu.items()},
        **{f"{kind}_megabytes": megabytes for kind, megabytes in most.items()},
        "time_ratio": best["merge"] / best["peft"],
        "cpu_ratio": cpu["merge"] / cpu["peft"],
        "memory_ratio": most["merge"] / most["peft"],
    }


@pytest.mark.benchmark
@pytest.mark.timeout(600)
def test_merge_against_peft() -> None:
    found = compare(0.05, repeat=1)
    print(json.dumps(found))
    assert found["memory_ratio"] < 2 and found["gigabytes"] > 0.03


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("gigabytes", type=float, nargs="?", default=1.9)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--build", type=Path, default=None)
    options = parser.parse_args()
    if options.build:
        build_adapted(options.build, options.gigabytes)
    else:
        print(json.dumps({key: round(value, 2) for key, value in compare(options.gigabytes, options.repeat).items()}))
