"""The callback on real GPUs: a random llama in bf16 under ZeRO-3 and NCCL, with and without the guard.

    torchrun --standalone --nproc_per_node 2 -m tests.benchmarks.bench_gpu [HIDDEN] [LAYERS] [STEPS]

Four runs in one launch, deterministic kernels: without the guard, with it (drift every step, routing drift every 4),
without it again as the control, and with it and its default probes. Prints, on rank 0, one line of JSON: seconds of
each run and of its steps, what the guard says it took, GPU memory, and whether losses, gradient norms and saved
weights are bit-identical. The restored checkpoint is judged by the hand-written oracle.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers import default_data_collator as collate

import qkguard
from qkguard import QKGuardCallback
from tests import judge
from tests.distributed.cases import deepspeed_config
from tests.training import Recorder

TOKENIZER = Path(qkguard.__file__).parent / "demo" / "model"  # probes need one; its ids are among the model's
GUARDED = {"routing_drift_steps": 4, "final_export": False, "strict": True}
RUNS = {"plain": None, "guarded": GUARDED | {"probe_steps": "0"}, "again": None, "probed": GUARDED}


class Clock(TrainerCallback):
    """Wall time at the starts of steps, the accelerator idle."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        torch.accelerator.synchronize()
        self.starts.append(time.perf_counter())

    def seconds(self, began: float) -> dict[str, float]:
        """From `began` to the first step, of a step (median and mean), and to now, when training has ended."""
        torch.accelerator.synchronize()
        steps = [b - a for a, b in zip(self.starts[2:], self.starts[3:], strict=False)]
        all_of_it = {"start": self.starts[0] - began, "all": time.perf_counter() - began}
        return all_of_it | {"step": statistics.median(steps), "mean_step": statistics.mean(steps)}


def probes(guard: QKGuardCallback, run: Path, steps: int) -> dict[str, object]:
    """What ran of the probes and what they took, by the guard's own account; the first and last come regardless."""
    rows = judge.metrics_rows(run)
    keys = {"raw": "qkguard/overhead/probe_seconds", "restored": "qkguard/overhead/probe_restored_seconds"}
    probing = guard.session.probing
    return {
        "seconds": {name: [r[key] for r in rows if key in r] for name, key in keys.items()},
        "scheduled_between": sum(step % probing.every == 0 for step in range(1, steps)),
        "first_s": probing.budget.first,  # with finding the answer forms
        "others_s": probing.budget.spent,
    }


def main(hidden: int = 2048, layers: int = 16, steps: int = 12) -> None:
    rank = int(os.environ["RANK"])
    folder = Path(tempfile.gettempdir()) / "qkguard-bench-gpu"
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
    if rank == 0:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder / "base")
        print("parameters", sum(p.numel() for p in model.parameters()), flush=True)
        del model
    rows = torch.randint(0, 32000, (steps * 4, 2048), generator=torch.Generator().manual_seed(1)).tolist()
    data = Dataset.from_list([{"input_ids": r, "labels": r} for r in rows])
    report: dict[str, object] = {"device": torch.cuda.get_device_name(), "ranks": int(os.environ["WORLD_SIZE"])}
    runs = {}
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass repeats only where nothing may warn
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for name, settings in RUNS.items():
        args = TrainingArguments(
            output_dir=str(folder / name),
            max_steps=steps,
            save_steps=steps,
            save_only_model=True,
            logging_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            bf16=True,
            gradient_checkpointing=True,
            report_to=[],
            disable_tqdm=True,
            deepspeed=deepspeed_config(3, tight=False),
            optim="adamw_torch",
        )
        dist.barrier()
        model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        clock, recorder = Clock(), Recorder()
        guard = None if settings is None else QKGuardCallback(**settings)
        callbacks = [clock, recorder, *([guard] if guard else [])]
        torch.cuda.reset_peak_memory_stats()
        given = {"processing_class": tokenizer, "data_collator": collate}  # a tokenizer's own would add masks
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks, **given)
        began = time.perf_counter()
        trainer.train()
        runs[name] = (recorder.rows, clock.seconds(began), torch.cuda.max_memory_allocated() / 1e9)
        trainer.accelerator.free_memory()
        if guard:
            report["reference_mb_this_rank"] = guard.session.reference.nbytes / 1e6
        if guard and rank == 0 and guard.session.probing.prober is not None:
            report["probes"] = probes(guard, folder / name, steps)
        del model, trainer, guard, callbacks
        gc.collect()
        torch.cuda.empty_cache()
    if rank == 0:
        raws = {name: folder / name / f"checkpoint-{steps}" for name in runs}
        bits = {name: judge.weights_in_bits(raw) for name, raw in raws.items()}
        same = {
            n: {"losses and norms": runs[n][0] == runs["plain"][0], "weights": bits[n] == bits["plain"]}
            for n in runs
            if n != "plain"
        }
        raw = raws["guarded"]
        judge.judge_restored("llama", folder / "base", raw, raw / "qk_restored", torch.bfloat16)
        rows = judge.metrics_rows(folder / "guarded")
        drift = [r for r in rows if "qkguard/drift/q_rel" in r]
        for part in "qk":
            for layer, want in judge.drift_by_layer(
                "llama", part, folder / "base", raw, torch.bfloat16, floor=0
            ).items():
                got = drift[-1][f"qkguard/drift/layer_{layer}/{part}_rel"]
                assert abs(got / want - 1) < 1e-6, (layer, part, got, want)
        took = {routing: [] for routing in (False, True)}
        for row in drift[1:-1]:
            took["qkguard/drift/routing_rel" in row].append(row["qkguard/overhead/drift_seconds"])
        report |= {
            "seconds": {name: run[1] for name, run in runs.items()},
            "gpu_gb": {name: run[2] for name, run in runs.items()},
            "drift_s": statistics.median(took[False]),
            "drift_and_routing_s": statistics.median(took[True]),
            "save_s": next(r["qkguard/overhead/save_seconds"] for r in rows if "qkguard/overhead/save_seconds" in r),
            "bit_identical_to_plain": same,
            "q_rel": drift[-1]["qkguard/drift/q_rel"],
        }
        print(json.dumps(report), flush=True)
        assert "probes" in report, "the probed run had no probes"
        if all(same["again"].values()):  # else the kernels themselves do not repeat
            assert all(value for found in same.values() for value in found.values())
    dist.barrier()


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may differ from run to run

    import deepspeed

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed("nccl", verbose=False)
    main(*map(int, sys.argv[1:]))
    dist.destroy_process_group()
