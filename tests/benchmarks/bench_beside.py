"""Steps beside a background write, and with drift, against steps alone: a random llama in bf16 under ZeRO-3.

    python -m tests.benchmarks.bench_beside [HIDDEN] [LAYERS] [WRITES] [--ranks 2]

One launch, otherwise as `bench_gpu`. The first checkpoint is restored again and again, every `EVERY` steps, and before
that `DRIFT` steps measure drift: so many steps of each kind alternate in one run, where `bench_gpu` has a handful.
Prints one line of JSON: how many steps of each kind there were, their medians and means in seconds, and the seconds of
the writes. Without a GPU it runs on the CPU, to look at that line: `bench_beside 256 2 2 --length 64`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback
from transformers import default_data_collator as collate

from qkguard import QKGuardCallback
from tests.benchmarks.bench_gpu import CUDA, save_base, synchronize, training_arguments
from tests.support import judge

SAVE, FIRST, EVERY, DRIFT = 3, 12, 20, 7


class OneSave(TrainerCallback):
    """Trainer saves once; stands before the guard."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == SAVE


class Writes(TrainerCallback):
    """Restores the checkpoint anew every `EVERY` steps, and times the others; stands behind the guard."""

    def __init__(self, guard: QKGuardCallback) -> None:
        self.guard, self.began, self.kind = guard, 0.0, ""
        self.steps: dict[str, list[float]] = {"alone": [], "with_drift": [], "beside_write": []}

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        now = time.perf_counter()
        if self.kind:
            self.steps[self.kind].append(now - self.began)
        self.began, self.kind = now, self.kind_of(state.global_step + 1)

    def kind_of(self, step: int) -> str:
        """The step that begins; "" for what is not timed: the first ones, and those between two kinds."""
        place = (step - FIRST) % EVERY  # 0: it ends with a save
        if step <= FIRST or place in (0, EVERY - DRIFT):
            return ""
        if self.guard.session.background.busy:
            return "beside_write" if place < EVERY - DRIFT else ""
        return "with_drift" if place > EVERY - DRIFT else "alone"

    def on_step_end(self, args, state, control, **kwargs):
        step, session = state.global_step, self.guard.session
        place = (step - FIRST) % EVERY
        if place >= EVERY - DRIFT:
            session.drift.measure(step, drift=True, routing=False, beside=True)
        if step >= FIRST and place == 0:
            session.background.finish()
            checkpoint = Path(args.output_dir) / f"checkpoint-{SAVE}"
            if args.should_save:
                shutil.rmtree(checkpoint / "qk_restored", ignore_errors=True)
            session.restore_checkpoint(checkpoint, step, None)


def summary(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {"steps": 0}
    return {"steps": len(seconds), "median": statistics.median(seconds), "mean": statistics.mean(seconds)}


def train(folder: Path, writes: int, length: int) -> dict[str, object]:
    """The run on the ranks of this launch; what rank 0 saw of it."""
    import deepspeed

    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed("nccl" if CUDA else "gloo", verbose=False)
    steps = FIRST + EVERY * writes - 1
    rows = torch.randint(0, 32000, (steps * 4, length), generator=torch.Generator().manual_seed(1)).tolist()
    guard = QKGuardCallback(
        drift_steps=0, routing_drift_steps=0, probe_steps=0, final_export=False, strict=True, base_model="live"
    )
    clock = Writes(guard)
    Trainer(
        model=LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16),
        args=training_arguments(folder / "run", steps, save_strategy="no"),
        train_dataset=Dataset.from_list([{"input_ids": r, "labels": r} for r in rows]),
        callbacks=[OneSave(), guard, clock],
        data_collator=collate,
    ).train()
    found = {
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "ranks": dist.get_world_size(),
        **{kind: summary(seconds) for kind, seconds in clock.steps.items()},
    }
    dist.barrier()
    dist.destroy_process_group()
    return found


def main(hidden: int, layers: int, writes: int, ranks: int, length: int, folder: Path) -> None:
    save_base(folder, hidden, layers)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launch += ["-m", "tests.benchmarks.bench_beside", *map(str, (hidden, layers, writes)), "--length", str(length)]
    subprocess.run([*launch, "--folder", str(folder)], check=True, timeout=900)
    key = "qkguard/overhead/save_background_seconds"
    seconds = [row[key] for row in judge.metrics_rows(folder / "run") if key in row]
    print(json.dumps(json.loads((folder / "found.json").read_text()) | {"write_s": seconds}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("hidden", type=int, nargs="?", default=4096)
    parser.add_argument("layers", type=int, nargs="?", default=20)
    parser.add_argument("writes", type=int, nargs="?", default=6)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a training sample")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        result = train(given.folder, given.writes, given.length)
        if os.environ["RANK"] == "0":
            (given.folder / "found.json").write_text(json.dumps(result))
    else:
        with tempfile.TemporaryDirectory(prefix="qkguard-bench-beside-") as temporary:
            main(**vars(given) | {"folder": Path(temporary)})
