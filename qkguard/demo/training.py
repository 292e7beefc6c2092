"""The demo's CoT-SFT: TRL's SFTTrainer with the callback, as in a script of one's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from qkguard.demo.arithmetic import problems
from qkguard.training.callback import QKGuardCallback

Watch = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Opens a progress bar with a label; inside, a function of (done, total)."""


def fine_tune(
    model: Path, tokenizer: Any, out: Path, *, steps: int, batch: int, learning_rate: float, seed: int, watch: Watch
) -> list[tuple[int, float]]:
    """Train on generated step-by-step arithmetic in `out`; the guard leaves its files in `out/_qkguard`.

    Returns:
        (step, training loss) at every logging step.
    """
    chains = islice(problems(seed=1000 + seed), steps * batch)
    data = Dataset.from_list([{"prompt": chain.prompt, "completion": chain.completion} for chain in chains])
    args = SFTConfig(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 20),
        optim="adamw_torch",
        max_length=256,
        seed=seed,
        logging_steps=max(1, steps // 60),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        # The one expert as a plain loop: twice as fast on a CPU.
        model_init_kwargs={"dtype": "float32", "experts_implementation": "eager", "device_map": None},
    )
    # No probes in between: the demo measures recall itself, before and after, on more samples
    guard = QKGuardCallback(routing_drift_steps="logging", probe_steps=0)
    trainer = SFTTrainer(
        model=str(model),
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[_Watched(watch), guard],  # in this order: the bar is gone before the guard writes its files
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [(int(row["step"]), row["loss"]) for row in trainer.state.log_history if "loss" in row]


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
