"""The guard's metrics in a tracker of your own, beside W&B, TensorBoard, MLflow and trackio, which need no code.

python own_tracker.py   # a small hybrid that ships with qkguard, half a minute on a CPU
python own_tracker.py Qwen/Qwen3-0.6B-Base
"""

import csv
import sys
from collections.abc import Mapping
from itertools import islice

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from qkguard import QKGuardCallback
from qkguard.demo import MODEL
from qkguard.demo.arithmetic import problems
from qkguard.training.trackers import Tracker


class CSVTracker(Tracker):
    """Rows of step, key and value in a file. The guard calls it on rank 0; what it raises is a line in the log."""

    def __init__(self, path: str) -> None:
        self.path = path

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        self._write((step, key, value) for key, value in metrics.items())

    def summary(self, values: Mapping[str, float | str]) -> None:
        self._write(("end", key, value) for key, value in values.items())

    def _write(self, rows) -> None:
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


model = sys.argv[1] if len(sys.argv) > 1 else str(MODEL)
small = model == str(MODEL)
chains = islice(problems(seed=1), 120)
args = SFTConfig(
    output_dir="out-tracker",
    max_steps=6,
    learning_rate=2e-3 if small else 1e-5,
    per_device_train_batch_size=4,
    max_length=256,
    save_strategy="no",
    logging_steps=2,
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
    report_to="none",
)
trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=Dataset.from_list([{"prompt": c.prompt, "completion": c.completion} for c in chains]),
    callbacks=[QKGuardCallback(trackers=[CSVTracker("guard.csv")])],
)
trainer.train()
