"""`qkguard restore` against `cp -r` and `sync` of the same folder: ratios of one run, and peak memory.

    python -m pytest -m benchmark -s tests/benchmarks/bench_restore.py
    python -m tests.benchmarks.bench_restore [GIGABYTES] [SHARD]      e.g. 1.9 500MB

Targets: 1.3 times `cp -r` and `sync` plus 1 s for a config seen before, 1.5 times plus 6 s for a new one, under 512 MB
of memory (finding the layout of a config with larger layers takes more, once).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.benchmarks.measuring import Took, timed

LAYERS = 24


def build(folder: Path, gigabytes: float, shard: str) -> tuple[Path, Path]:
    """A base and a tuned bf16 llama of about that size each, from one block of random numbers."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden = round((gigabytes * 1e9 / 2 / (LAYERS * 12.5)) ** 0.5 / 64) * 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=int(hidden * 3.5) // 64 * 64,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    block = torch.randn(1 << 22, dtype=torch.bfloat16)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name in ("base", "tuned"):
        block = block.roll(1)
        for module in meta.modules():
            for key, param in list(module.named_parameters(recurse=False)):
                count = prod(param.shape)
                filled = block.repeat(-(-count // block.numel()))[:count].view(param.shape)
                setattr(module, key, nn.Parameter(filled, requires_grad=False))
        meta.tie_weights()
        meta.save_pretrained(folder / name, max_shard_size=shard)
    return folder / "base", folder / "tuned"


def compare(gigabytes: float = 1.9, shard: str = "50GB", repeats: int = 3) -> dict[str, float]:
    """Best of `repeats` for each, in turn, page cache warm, everything written back in between.

    A restore of a new config has to find the layout, which imports transformers' code of the model.
    """
    command = [sys.executable, "-m", "qkguard"]
    with tempfile.TemporaryDirectory(dir=os.environ.get("QKGUARD_BENCH_DIR")) as name:
        folder = Path(name)
        # In its own process: the builder's memory is not the benchmark's.
        here = [sys.executable, "-m", "tests.benchmarks.bench_restore"]
        subprocess.run([*here, "--build", name, str(gigabytes), shard], check=True)
        base, tuned = folder / "base", folder / "tuned"
        size = sum(file.stat().st_size for file in tuned.iterdir())
        os.environ["QKGUARD_CACHE"] = str(folder / "cache")
        copy = ["sh", "-c", 'cp -r "$1" "$2" && sync', "sh", str(tuned), str(folder / "out")]
        restore = [*command, "restore", "-b", str(base), "-t", str(tuned), "-o", str(folder / "out"), "--json"]
        runs: dict[str, list[Took]] = {"cp": [], "new": [], "known": []}
        for _ in range(repeats):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for kind, found in runs.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                found.append(timed(copy if kind == "cp" else restore))
    cp, new, known = (min(took.seconds for took in found) for found in runs.values())
    return {
        "gigabytes": size / 1e9,
        "cp_sync_seconds": cp,
        "known_seconds": known,
        "known_target_seconds": 1.3 * cp + 1,
        "known_ratio": known / cp,
        "known_cpu_seconds": min(took.cpu for took in runs["known"]),
        "known_peak_megabytes": max(took.megabytes for took in runs["known"]),
        "new_seconds": new,
        "new_target_seconds": 1.5 * cp + 6,
        "new_ratio": new / cp,
        "new_peak_megabytes": max(took.megabytes for took in runs["new"]),
    }


@pytest.mark.benchmark
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shard", ["50GB", "300MB"])
def test_restore_against_cp(shard: str) -> None:
    for key, value in compare(shard=shard).items():
        print(f"{key:>24} {value:8.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--build"]:
        build(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
    else:
        sizes = sys.argv[1:] or ["1.9"]
        for key, value in compare(float(sizes[0]), *sizes[1:2]).items():
            print(f"{key:>24} {value:8.2f}")
