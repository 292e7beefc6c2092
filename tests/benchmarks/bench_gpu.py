"""The callback on real GPUs: a random llama in bf16 under ZeRO-3 and NCCL, with and without the guard.

    python -m tests.benchmarks.bench_gpu [HIDDEN] [LAYERS] [STEPS] [--ranks 2]

Deterministic kernels, and every run a launch of its own (DeepSpeed leaves memory and hooks behind, and each run after
another in one process is slower): without the guard, with it (drift every step, routing drift every 4), without it
again as the control, and with it and its default probes. Every run saves half-way and at its end.

Prints one line of JSON: seconds of each run and of its steps, also of those beside the guard's write; what Trainer
took to save, what the guard then kept it waiting and what it wrote in the background; what else the guard says it
took, GPU memory, and whether losses, gradient norms and saved weights are bit-identical. Then the restored checkpoints
are judged by the hand-written oracle. Without a GPU it runs on the CPU, to look at that line:
`bench_gpu 256 2 8 --length 64`.
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
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers import default_data_collator as collate

import qkguard
from qkguard import QKGuardCallback
from qkguard.training.recall_monitor import RecallMonitor
from tests.distributed.cases import deepspeed_config
from tests.support import judge
from tests.support.training import Recorder

CUDA = torch.cuda.is_available()
TOKENIZER = Path(qkguard.__file__).parent / "demo" / "model"  # probes need one; its ids are among the model's
GUARDED = {"routing_drift_steps": 4, "final_export": False, "strict": True}
RUNS = {"plain": None, "guarded": GUARDED | {"probe_steps": "0"}, "again": None, "probed": GUARDED}


def synchronize() -> None:
    """Wait for the training's own stream: what the guard begins beside a step need not be done."""
    if CUDA:
        torch.cuda.current_stream().synchronize()


class Clock(TrainerCallback):
    """Wall time at the starts of steps and around saves, the training's work done; comes before the guard."""

    def __init__(self, guard: QKGuardCallback | None) -> None:
        self.guard = guard
        self.starts: list[float] = []
        self.beside_write: list[bool] = []
        self.saved_after: set[int] = set()
        self.trainer_saves: list[float] = []
        self.step_over = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.starts.append(time.perf_counter())
        self.beside_write.append(bool(self.guard) and self.guard.session.background.busy)

    def on_log(self, args, state, control, **kwargs):  # every step, right before Trainer saves
        synchronize()
        self.step_over = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.trainer_saves.append(time.perf_counter() - self.step_over)
        self.saved_after.add(state.global_step)

    def seconds(self, began: float) -> dict[str, object]:
        """From `began` to the first step, of a step (median and mean), and to now, when training has ended.

        The first two steps and those that end in a save are left out; "beside_write" are the numbers of the steps that
        began while the guard's thread was at work.
        """
        synchronize()
        steps = {n: b - a for n, (a, b) in enumerate(zip(self.starts, self.starts[1:], strict=False), 1)}
        steps = {n: step for n, step in steps.items() if n > 2 and n not in self.saved_after}
        alone = [step for n, step in steps.items() if not self.beside_write[n - 1]]
        return {
            "start": self.starts[0] - began,
            "all": time.perf_counter() - began,
            "step": statistics.median(alone),
            "mean_step": statistics.mean(steps.values()),
            "beside_write": [n for n in steps if self.beside_write[n - 1]],
            "steps": steps,
            "trainer_saves": self.trainer_saves,
        }


def probes(guard: QKGuardCallback, run: Path, steps: int) -> dict[str, object]:
    """What ran of the probes and what they took, by the guard's own account; the first and last come regardless."""
    rows = judge.metrics_rows(run)
    keys = {"raw": "qkguard/overhead/probe_seconds", "restored": "qkguard/overhead/probe_restored_seconds"}
    probing = guard.session.recall_monitor
    return {
        "seconds": {name: [r[key] for r in rows if key in r] for name, key in keys.items()},
        "scheduled_between": sum(step % probing.training.every == 0 for step in range(1, steps)),
        "first_s": probing.costs.budget.first,  # with finding the answer forms
        "asked": len(probing.prober.sample_keys),
    }


def training_arguments(output_dir: Path, steps: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        save_only_model=True,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        bf16=CUDA,
        use_cpu=not CUDA,
        gradient_checkpointing=True,
        report_to=[],
        disable_tqdm=True,
        deepspeed=deepspeed_config(3, tight=False),
        optim="adamw_torch",
        **options,
    )


def train(name: str, folder: Path, steps: int, length: int) -> dict[str, object]:
    """One run on the ranks of this launch; what rank 0 saw of it."""
    import deepspeed

    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed("nccl" if CUDA else "gloo", verbose=False)
    torch.use_deterministic_algorithms(True)  # to only warn would leave attention's backward pass as it is
    rows = torch.randint(0, 32000, (steps * 4, length), generator=torch.Generator().manual_seed(1)).tolist()
    args = training_arguments(folder / name, steps, save_steps=steps // 2)
    model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    RecallMonitor.at_floor = False  # type: ignore[assignment, method-assign]  # random weights find no needles
    guard = None if RUNS[name] is None else QKGuardCallback(**RUNS[name])
    clock, recorder = Clock(guard), Recorder()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list([{"input_ids": r, "labels": r} for r in rows]),
        callbacks=[clock, recorder, *([guard] if guard else [])],
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        data_collator=collate,  # the tokenizer's own would add masks
    )
    trainer.remove_callback(PrinterCallback)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    trainer.train()
    memory = torch.cuda.max_memory_allocated() / 1e9 if CUDA else None
    found = {"rows": recorder.rows, "seconds": clock.seconds(began), "gpu_gb": memory}
    if guard:
        found["reference_mb"] = guard.session.reference.nbytes / 1e6
        if guard.session.recall_monitor.prober is not None:
            found["probes"] = probes(guard, folder / name, steps)
    found |= {"device": torch.cuda.get_device_name() if CUDA else "cpu", "ranks": dist.get_world_size()}
    dist.barrier()
    dist.destroy_process_group()
    return found


def save_base(folder: Path, hidden: int, layers: int) -> None:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    print("parameters", model.num_parameters(), flush=True)
    model.save_pretrained(folder / "base")
    del model
    if CUDA:
        torch.cuda.empty_cache()


def pair(run: Path, step: int) -> tuple[Path, Path]:
    return run / f"checkpoint-{step}", run / f"checkpoint-{step}/qk_restored"


def check_last(folder: Path, raw: Path, dtype: torch.dtype) -> None:
    """Recompute the guarded run's restored checkpoint and last drift."""
    judge.judge_restored("llama", folder / "base", raw, raw / "qk_restored", dtype)
    rows = judge.metrics_rows(folder / "guarded")
    last = [r for r in rows if "qkguard/drift/q_rel" in r][-1]
    for part in "qk":
        drift = judge.drift_by_layer("llama", part, folder / "base", raw, dtype, floor=0)
        for layer, want in drift.items():
            got = last[f"qkguard/drift/layer_{layer}/{part}_rel"]
            assert abs(got / want - 1) < 1e-6, (layer, part, got, want)


def overhead(rows: list[dict], kind: str) -> list[float]:
    return [row[key] for key in [f"qkguard/overhead/{kind}_seconds"] for row in rows if key in row]


def hashes(folder: Path, run: str, steps: int) -> dict[str, str]:
    """Of the weights that a run saved last. Its models go, to save disk; those of the guarded run are judged."""
    file = folder / f"{run}-hashes.json"
    if not file.exists():
        file.write_text(json.dumps(judge.weight_hashes(folder / run / f"checkpoint-{steps}")))
    if run != "guarded":
        shutil.rmtree(folder / run, ignore_errors=True)
    return json.loads(file.read_text())


def main(hidden: int, layers: int, steps: int, ranks: int, length: int, folder: Path) -> None:
    """Make what the folder does not hold yet, print the line, and judge the restored checkpoints."""
    if not (folder / "base").exists():
        save_base(folder, hidden, layers)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launch += ["-m", "tests.benchmarks.bench_gpu", *map(str, (hidden, layers, steps)), "--folder", str(folder)]
    launch += ["--length", str(length)]
    bits = {}
    for run in RUNS:
        if not (folder / f"{run}.json").exists():
            subprocess.run([*launch, "--only", run], check=True, timeout=900)
        bits[run] = hashes(folder, run, steps)
    found = {run: json.loads((folder / f"{run}.json").read_text()) for run in RUNS}
    report(found, bits, judge.metrics_rows(folder / "guarded"))
    dtype = torch.bfloat16 if CUDA else torch.float32
    judge.judge_restored("llama", folder / "base", *pair(folder / "guarded", steps // 2), dtype)
    check_last(folder, folder / "guarded" / f"checkpoint-{steps}", dtype)
    print("The restored checkpoints and the last drift are as recomputed.")


def report(found: dict[str, dict], bits: dict[str, dict[str, str]], rows: list[dict]) -> None:
    took: dict[bool, list[float]] = {False: [], True: []}
    for row in [r for r in rows if "qkguard/drift/q_rel" in r][1:-1]:
        took["qkguard/drift/routing_rel" in row].append(row["qkguard/overhead/drift_seconds"])
    same = {
        run: {"losses and norms": one["rows"] == found["plain"]["rows"], "weights": bits[run] == bits["plain"]}
        for run, one in found.items()
        if run != "plain"
    }
    seconds = {run: one["seconds"] for run, one in found.items()}
    beside = seconds["guarded"]["beside_write"]  # Trainer's own files are on their way to the disk then, in every run
    line = {
        **{key: found["guarded"][key] for key in ("device", "ranks", "reference_mb")},
        **{key: {run: one[key] for run, one in found.items()} for key in ("seconds", "gpu_gb")},
        "same_steps_as_beside_write": {
            run: statistics.median(one["steps"][str(n)] for n in beside) if beside else None
            for run, one in seconds.items()
        },
        "drift_s": statistics.median(took[False]),
        "drift_and_routing_s": statistics.median(took[True]),
        "save_s": overhead(rows, "save"),
        "save_background_s": overhead(rows, "save_background"),
        "trainer_save_s": found["guarded"]["seconds"]["trainer_saves"],
        "probes": found["probed"]["probes"],
        "bit_identical_to_plain": same,
    }
    print(json.dumps(line), flush=True)
    if all(same["again"].values()):  # else the kernels themselves do not repeat
        assert all(value for run in same.values() for value in run.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("hidden", type=int, nargs="?", default=2048)
    parser.add_argument("layers", type=int, nargs="?", default=16)
    parser.add_argument("steps", type=int, nargs="?", default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a training sample")
    parser.add_argument("--only", choices=RUNS, help="one of the launches that this script makes")
    parser.add_argument("--folder", type=Path, help="where to work; what is there already is not made again")
    given = vars(parser.parse_args())
    run = given.pop("only")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may differ from run to run
    if run:
        result = train(run, given["folder"], given["steps"], given["length"])
        if os.environ["RANK"] == "0":
            (given["folder"] / f"{run}.json").write_text(json.dumps(result))
    elif given["folder"]:
        main(**given)
    else:
        with tempfile.TemporaryDirectory(prefix="qkguard-bench-gpu-") as temporary:
            main(**given | {"folder": Path(temporary)})
