"""Tiny guarded trainings for tests: a base checkpoint, rows of random tokens, arguments that run on a CPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from tests.support.models import tiny_model
from tests.support.tokens import tiny_tokenizer


def save_base(folder: Path, name: str = "minimax", **options: Any) -> Path:
    tiny_model(name, **options).save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return folder


def token_rows(count: int = 48) -> Dataset:
    generator = random.Random(0)
    return Dataset.from_list(
        [{"input_ids": [generator.randrange(3, 256) for _ in range(12 + i % 9)]} for i in range(count)]
    )


def arguments(folder: Path, cls: type = SFTConfig, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": 3,
        "save_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    return cls(**settings | options)


@contextmanager
def saved_in_shards(size: str = "20KB") -> Iterator[None]:
    """Inside the block models are saved in files of this size, so that several ranks have something to write."""
    original = PreTrainedModel.save_pretrained

    def save(self: Any, *args: Any, **options: Any) -> Any:
        return original(self, *args, **{"max_shard_size": size} | options)

    PreTrainedModel.save_pretrained = save
    try:
        yield
    finally:
        PreTrainedModel.save_pretrained = original


class OnlySaves(TrainerCallback):
    """Saves at these steps alone; the arguments say save_steps=1, and the guard's callback comes before."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save and state.global_step in self.steps


class Recorder(TrainerCallback):
    """Losses and gradient norms as logged; under DeepSpeed, accelerate 1.4 gives no norm."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float | None]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.rows.append((logs["loss"], logs.get("grad_norm")))


def make_trainer(base: Path, args: Any, guard: Any = None, model: Any = None, **options: Any) -> Any:
    """An SFTTrainer for SFTConfig, else transformers' Trainer, with a `recorder`."""
    set_seed(args.seed)  # TRL before 1.0 draws an adapter's weights before it sets the seed
    recorder = Recorder()
    callbacks = [recorder] + ([guard] if guard else [])
    if isinstance(args, SFTConfig):
        settings = {"model": model if model is not None else str(base), "train_dataset": token_rows()}
        settings["processing_class"] = tiny_tokenizer()
        trainer: Any = SFTTrainer(args=args, callbacks=callbacks, **settings | options)
    else:
        data = token_rows().map(lambda r: {"input_ids": r["input_ids"][:12], "labels": r["input_ids"][:12]})
        model = model if model is not None else AutoModelForCausalLM.from_pretrained(base)
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks, **options)
    trainer.recorder = recorder
    return trainer


def train(base: Path, args: Any, guard: Any = None, resume: bool = False, **options: Any) -> Any:
    trainer = make_trainer(base, args, guard, **options)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


__all__ = [
    "OnlySaves",
    "Recorder",
    "TrainingArguments",
    "arguments",
    "make_trainer",
    "save_base",
    "saved_in_shards",
    "token_rows",
    "train",
]
