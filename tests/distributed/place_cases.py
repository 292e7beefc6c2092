"""On real ranks: where folders are assembled, which step final numbers carry, and FSDP1 refused by its name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments

from qkguard import QKGuardCallback, QKGuardError
from tests.distributed.cases import STEPS, base_model, deepspeed_config, rank
from tests.support import judge
from tests.support.training import arguments, make_trainer, token_rows, train


def run_folder_elsewhere(folder: Path) -> None:
    """The run folder on another file system than the checkpoints, which the ranks write together."""
    base = base_model(folder)
    if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == folder.stat().st_dev:
        return  # no second file system at hand
    names = [tempfile.mkdtemp(dir="/dev/shm") if rank() == 0 else None]
    dist.broadcast_object_list(names)
    elsewhere = Path(str(names[0]))
    try:
        train(base, arguments(folder), QKGuardCallback(output_dir=elsewhere, strict=True))
        dist.barrier()
        if rank() == 0:
            checkpoint = folder / f"run/checkpoint-{STEPS}"
            final = elsewhere / "final"
            judge.judge_restored("minimax", base, checkpoint, checkpoint / "qk_restored", torch.float32)
            judge.judge_restored("minimax", base, final / "raw", final / "qk_restored", torch.float32)
            assert not list(folder.rglob("_qkguard-tmp-*")) and not list(elsewhere.rglob("_qkguard-tmp-*"))
        dist.barrier()
    finally:
        if rank() == 0:
            shutil.rmtree(elsewhere)


def best_step(folder: Path, backend: str) -> None:
    """After `load_best_model_at_end` every rank takes the final weights for the best step's."""
    base = base_model(folder)
    scores = iter([1.0, 3.0, 2.0])
    options = {"deepspeed": deepspeed_config(3)} if backend == "zero3" else {}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "score", "greater_is_better": True}
    args = arguments(folder, TrainingArguments, **options)
    rows = token_rows(4).map(lambda r: {"input_ids": r["input_ids"][:12], "labels": r["input_ids"][:12]})
    guard = QKGuardCallback(strict=True, routing_drift_steps=1)
    trainer = make_trainer(base, args, guard, eval_dataset=rows, compute_metrics=lambda _: {"score": next(scores)})
    trainer.train()
    assert guard.session is not None and guard.session.final_step == 2
    if rank() == 0:
        run = folder / "run"
        manifest = json.loads((run / "_qkguard/final/qk_restored/qkguard.json").read_text())
        assert manifest["step"] == manifest["drift"]["step"] == judge.metrics_rows(run)[-1]["step"] == 2
        held = [judge.weights_in_bits(run / name) for name in ("_qkguard/final/raw", "checkpoint-2", "checkpoint-3")]
        assert held[0] == held[1] != held[2]


def fsdp1(folder: Path) -> None:
    """Refused on all ranks before a layout is looked for in its flattened parameters."""
    base = base_model(folder)
    args = TrainingArguments(output_dir=str(folder / "run"), use_cpu=True, report_to=[])
    for original in (False, True):
        options = {"use_orig_params": original, "device_id": torch.device("cpu")}
        model = FullyShardedDataParallel(AutoModelForCausalLM.from_pretrained(base), **options)
        try:
            QKGuardCallback().on_train_begin(args, TrainerState(), TrainerControl(), model=model)
        except QKGuardError as error:
            assert "FSDP1" in str(error) and "fsdp_version: 2" in str(error) and "another model" not in str(error)
        else:
            raise AssertionError("FSDP1 was taken for something it is not")
