"""The verdict on real ranks: training is left alone, and the numbers are one process's over the same points."""

from __future__ import annotations

import random
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkguard import QKGuardCallback, merge_adapter, sweep
from qkguard.demo import MODEL
from qkguard.demo.arithmetic import problems
from tests.distributed.cases import STEPS, check_backend, deepspeed_config, rank, reset
from tests.distributed.launch import sharding_of
from tests.support import judge
from tests.support.training import arguments, make_trainer

LAYERS = (2, 5)
PROSE = "The cat sat on the mat. The dog went for a walk. Rain fell on the hills all night. "


def chains(seed: int, count: int) -> Dataset:
    rows = islice(problems(seed=seed), count)
    return Dataset.from_list([{"prompt": row.prompt, "completion": row.completion} for row in rows])


def train(folder: Path, backend: str, flags: tuple[str, ...], guard: Any) -> Any:
    """The demo's model, of which the softmax layers' queries and keys are trained so hard that recall falls."""
    reset()
    options: dict[str, Any] = {"max_length": 256, "eval_strategy": "steps", "eval_steps": STEPS, "learning_rate": 0.03}
    if backend.startswith("zero"):
        options["deepspeed"] = deepspeed_config(int(backend[-1]), tight="default" not in flags)
    with sharding_of(backend):
        args = arguments(folder, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, experts_implementation="eager")
        adapters = None
        if "lora" in flags:
            targets = [f"layers.{n}.self_attn.{p}_proj" for n in LAYERS for p in "qkv"]
            adapters = LoraConfig(r=8, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM")
        else:
            ours = tuple(f"layers.{n}.self_attn.{p}_proj.weight" for n in LAYERS for p in "qk")
            for name, param in model.named_parameters():
                param.requires_grad_(name.endswith(ours))
        trainer = make_trainer(
            MODEL,
            args,
            guard,
            model=model,
            processing_class=AutoTokenizer.from_pretrained(MODEL),
            train_dataset=chains(7, 16),
            eval_dataset=chains(8, 9),
            peft_config=adapters,
        )
        trainer.train()
        trainer.save_model(str(folder / "after"))
    return trainer


def bits(folder: Path) -> Any:
    """The weights, or the adapter, saved in a folder."""
    adapter = folder / "adapter_model.safetensors"
    return judge.file_sha256(adapter) if adapter.exists() else judge.weights_in_bits(folder)


def outcome(folder: Path, trainer: Any) -> Any:
    streams = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return trainer.recorder.rows, evaluated, bits(folder / f"run/checkpoint-{STEPS}"), streams


def verdict(folder: Path, backend: str, *flags: str) -> None:
    """Flags: lora; default for DeepSpeed's default limits, under which parameters stay gathered."""
    prose = folder / "prose.txt"
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        prose.write_text(PROSE * 9)
    dist.barrier()
    trainer = train(folder / "bare", backend, flags, None)
    expected = outcome(folder / "bare", trainer)
    guard = QKGuardCallback(
        strict=True,
        method="auto",
        haystack=prose,
        probe_lengths=[128],
        probe_samples=2,
        probe_tasks=["s2"],
        probe_budget=None,
    )
    trainer = train(folder / "judged", backend, flags, guard)
    check_backend(guard, backend)
    assert outcome(folder / "judged", trainer) == expected
    if rank() == 0:
        run = folder / "judged/run"
        assert bits(folder / "judged/after") == bits(run / f"checkpoint-{STEPS}"), "the weights are not as they were"
        reset()
        check_numbers(run / "_qkguard", guard.session.verdict, prose, lora="lora" in flags)
    dist.barrier()


def check_numbers(run: Path, found: Any, prose: Path, *, lora: bool) -> None:
    """Recall hit for hit, loss and recommendation of `sweep` in one process: same points, samples and rows."""
    base, tuned = MODEL, run / "final/raw"
    if lora:  # the same model as full weights; from float32 files, to which nothing is rounded
        base, tuned = run.parent / "base", run.parent / "merged"
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).save_pretrained(base)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(base)
        merge_adapter(base, run / "final/raw/default", tuned, keep_qk=True)
    alone = sweep(
        base,
        tuned,
        methods="restore,interpolate:alpha=0.5" if lora else "restore,qk-pro:ridge=10,interpolate:alpha=0.5",
        data=run / "heldout.jsonl",
        haystack=str(prose),
        lengths=(128,),
        samples=2,
        tasks=("single_2",),
        dtype="float32",
        device="cpu",
    )
    live = {point.name: point for point in found.points}
    assert list(live) == [point.name for point in alone.points]
    for point in alone.points:
        mine = live[point.name]
        assert mine.probe.settings["digest"] == point.probe.settings["digest"]
        assert mine.probe.correct == point.probe.correct, (point.name, mine.recall, point.recall)
        if point.name != "base":
            assert len(mine.task.nll) == 9 and abs(mine.task.loss - point.task.loss) < 1e-4, (mine.task, point.task)
    assert found.recommended.name == alone.recommended.name
    losses = sorted(point.task.loss for name, point in live.items() if name != "base")
    assert all(b - a > 1e-3 for a, b in pairwise(losses)), "the points cannot be told apart"
    assert live["raw"].recall.value < live["base"].recall.value, "nothing was lost"
    assert (run / "final/RECOMMENDED").read_text().strip() == found.folder
