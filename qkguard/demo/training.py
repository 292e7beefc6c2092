"""The demo's CoT-SFT: TRL's SFTTrainer with the callback, as in a script of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from qkguard.demo.arithmetic import Chain, problems
from qkguard.demo.settings import DemoSettings
from qkguard.probe.haystack import generated_prose
from qkguard.training.callback import QKGuardCallback

SENTENCES = 2000
MAX_LENGTH = 128  # the longest problem with its chain of thought has 77 tokens
Watch = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Opens a progress bar with a label; inside, a function of (done, total)."""


def fine_tune(
    base: Path, tokenizer: Any, out: Path, settings: DemoSettings, exam: Sequence[Chain], watch: Watch
) -> list[tuple[int, float]]:
    """Train on generated step-by-step arithmetic in `out`; the guard leaves its files in `out/_qkguard`.

    Args:
        exam: problems kept out of training, which the verdict's loss is of.

    Returns:
        (step, training loss) at every logging step.
    """
    chains = islice(problems(1000 + settings.seed, settings.problem_lengths), settings.steps * settings.batch)
    args = SFTConfig(
        output_dir=str(out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, settings.steps // 20),
        optim="adamw_torch",
        max_length=MAX_LENGTH,
        seed=settings.seed,
        logging_steps=max(1, settings.steps // 40),
        eval_strategy="steps",
        eval_steps=settings.steps,  # once, at the end
        save_strategy="no",
        report_to="wandb" if settings.wandb else "none",
        run_name="qkguard demo",
        use_cpu=not settings.gpu,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        # The one expert as a plain loop: twice as fast on a CPU.
        model_init_kwargs={"dtype": "float32", "experts_implementation": "eager", "device_map": None},
    )
    guard = QKGuardCallback(
        method="interpolate",
        alpha=settings.alpha,
        tolerance=settings.tolerance,
        routing_drift_steps="logging",
        probe_steps=-(-settings.steps // settings.looks),
        probe_lengths=settings.lengths,
        probe_depths=settings.depths,
        probe_samples=settings.samples,
        probe_tasks=settings.tasks,
        haystack=_prose(out / "haystack.txt", settings.seed),
        probe_budget=None,  # a training of half a minute cannot pay for probes out of 2% of its time
        strict=True,
    )
    trainer = SFTTrainer(
        model=str(base),
        args=args,
        train_dataset=_rows(chains),
        eval_dataset=_rows(exam),
        processing_class=tokenizer,
        callbacks=[_Watched(watch), guard],  # in this order: the bar is gone before the guard writes its files
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [(int(row["step"]), row["loss"]) for row in trainer.state.log_history if "loss" in row]


def _prose(file: Path, seed: int) -> Path:
    """Text to hide needles in: the model has met such prose with needles in it, and arithmetic never."""
    file.write_text("\n".join(islice(generated_prose(Random(seed)), SENTENCES)) + "\n")
    return file


def _rows(chains: Any) -> Dataset:
    return Dataset.from_list([{"prompt": chain.prompt, "completion": chain.completion} for chain in chains])


class _Watched(TrainerCallback):
    """A progress bar over the steps."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = self.watch("CoT-SFT")
        self.move = self.bar.__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.move(state.global_step, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.__exit__(None, None, None)
