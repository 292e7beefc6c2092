"""`QKGuardCallback`: trainer events to the parts that do the work."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qkguard.distributed import sharding
from qkguard.errors import QKGuardError, current_names
from qkguard.training.attempt import attempt
from qkguard.training.probe_schedule import is_due
from qkguard.training.session import Session, run_folder

if TYPE_CHECKING:  # pydantic doubles the time that `from qkguard import QKGuardCallback` takes
    from qkguard.training.config import QKGuardConfig

LATER = "`qkguard restore` makes the restored model from the raw checkpoint, which is safe"


class QKGuardCallback(TrainerCallback):
    """Guards the queries and keys of a CoT-SFT run on TRL's SFTTrainer or transformers' Trainer.

    Keeps the pre-SFT W_Q and W_K of every softmax-attention layer, logs how far they drift, and writes a QK-restored
    model beside every raw checkpoint. Training itself is left alone: losses, weights and random streams are bit for
    bit those of a run without the callback.

        trainer = SFTTrainer(model=..., args=..., train_dataset=..., callbacks=[QKGuardCallback()])

    Args:
        config: settings; `overrides` replace single fields, so `QKGuardCallback(restore_on="end")` works alone.

    Raises:
        QKGuardError: on a bad setting; and from `train()`, on all ranks, when the layout or the reference cannot be
            established. Later only a changed reference stops a run, unless `strict`.
    """

    def __init__(self, config: QKGuardConfig | None = None, **overrides: Any) -> None:
        from qkguard.training.config import QKGuardConfig  # here, because pydantic takes as long to import as the rest

        if not isinstance(config, QKGuardConfig | None):
            raise QKGuardError(
                f"Invalid config={config!r}: expected a QKGuardConfig. Single settings are keyword arguments: "
                'QKGuardCallback(restore_on="end").'
            )
        overrides = current_names(overrides)
        self.config = replace(config, **overrides) if config else QKGuardConfig(**overrides)
        self.session: Session | None = None
        _show_log_lines()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        session, model = self.session, kwargs["model"]
        if session and session.model is sharding.unwrap(model) and session.folder == run_folder(self.config, args):
            session.begin(args, state)  # a second train() goes on from moved weights: the first reference stays
        else:
            session = self.session = _session_class(model)(self.config, args, state, model)
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        session.start_probes(args, state, kwargs.get("processing_class"), dataset)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        routing = is_due(self.config.routing_drift_steps, state.global_step, control.should_log)
        if self.session and (routing or is_due(self.config.drift_steps, state.global_step, control.should_log)):
            self.session.measure(state.global_step, routing=routing)
        if self.session and self.session.recall_monitor:
            self.session.recall_monitor.at_step(state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.session:
            self.session.keep_heldout(getattr(kwargs.get("eval_dataloader"), "dataset", None))
            if self.session.recall_monitor:
                self.session.recall_monitor.at_evaluation(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.session and args.logging_strategy == "epoch" and self.config.drift_steps == "logging":
            self.session.measure(state.global_step, routing=self.config.routing_drift_steps == "logging")

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        best = self.config.restore_on == "best" and state.best_global_step == state.global_step
        if self.session and (best or self.config.restore_on == "save"):
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            session = self.session
            if session.recall_monitor:
                session.recall_monitor.at_save(state, control)
            attempt(
                f"restoring {folder}",
                lambda: session.restore_checkpoint(folder, state.global_step, processing_class),
                strict=self.config.strict,
                advice=LATER,
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        session = self.session
        if session is None:
            return
        if self.config.drift_steps:
            session.measure(state.global_step, routing=bool(self.config.routing_drift_steps))
        if session.recall_monitor:
            session.recall_monitor.at_end(state, control)
        if self.config.final_export and self.config.restore_on != "never":
            attempt(
                "the final export",
                lambda: session.final_export(state, args, processing_class),
                strict=self.config.strict,
                advice=LATER,
            )
        session.finish()

    def save(self, trainer: Any, output_dir: str | Path) -> None:
        """`trainer.save_model(output_dir)` and the restored model in `output_dir/qk_restored`; ALL ranks.

        For scripts that save by hand, which fires no event.
        """
        if self.session is None:
            raise QKGuardError("nothing to restore from: the guard's reference is taken when train() begins")
        trainer.save_model(str(output_dir))
        self.session.restore_checkpoint(Path(output_dir), trainer.state.global_step, trainer.processing_class)


def _session_class(model: Any) -> type[Session]:
    if not hasattr(sharding.unwrap(model), "peft_config"):
        return Session
    from qkguard.training.adapter_session import AdapterSession  # imports PEFT

    return AdapterSession


def _show_log_lines() -> None:
    """Show qkguard's own lines where the script has set up no logging; the root logger is left alone."""
    package = logging.getLogger("qkguard")
    if not package.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[qkguard] %(levelname)s %(message)s"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False
