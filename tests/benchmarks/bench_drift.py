"""Drift at every logging step against the training step itself, SmolLM2-135M (real weights), sequence 256, batch 1.

    python -m pytest -m benchmark -s tests/benchmarks/bench_drift.py
    python tests/benchmarks/bench_drift.py [STEPS]

Target: under 1% of a step with `logging_steps=1`. Both times come from the same run: the drift time is what the guard
measures around its own work, the step time is the wall clock between two steps' starts, drift included.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from qkguard import QKGuardCallback
from tests.support.judge import metrics_rows
from tests.support.smollm2 import load_smollm2


class Clock(TrainerCallback):
    """Seconds between the starts of consecutive steps."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.starts.append(time.perf_counter())


def measure(folder: Path, steps: int = 12) -> dict[str, float]:
    from datasets import Dataset
    from transformers import Trainer

    model, _ = load_smollm2()
    tokens = torch.randint(100, 40000, (steps, 256), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in tokens])
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-5,
    )
    clock = Clock()
    guard = QKGuardCallback(base_model="live", routing_drift_steps=0, final_export=False, strict=True)
    Trainer(model=model, args=args, train_dataset=data, callbacks=[clock, guard]).train()
    drift = [r["qkguard/overhead/drift_seconds"] for r in metrics_rows(folder)][:steps]
    step = [b - a for a, b in zip(clock.starts[1:], clock.starts[2:], strict=False)]
    kept = guard.session.reference.nbytes
    return {
        "step_s": statistics.median(step),
        "drift_s": statistics.median(drift[1:]),
        "share": statistics.median(drift[1:]) / statistics.median(step),
        "reference_mb": kept / 1e6,
    }


@pytest.mark.benchmark
def test_drift_overhead(tmp_path):
    result = measure(tmp_path)
    print({k: round(v, 4) for k, v in result.items()})
    assert result["drift_s"] > 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print({k: round(v, 4) for k, v in measure(Path(scratch), int((sys.argv[1:] or ["12"])[0])).items()})
