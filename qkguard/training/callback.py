"""`QKGuardCallback`: hands the trainer's events to the session, which does the work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qkguard.errors import QKGuardError, current_names
from qkguard.training.attempt import LATER, attempt
from qkguard.training.resume import set_aside_alone
from qkguard.training.run_folder import run_folder
from qkguard.training.schedules import is_due, step_comes_next
from qkguard.training.session import Session

if TYPE_CHECKING:  # pydantic doubles the time that `from qkguard import QKGuardCallback` takes
    from qkguard.training.config import QKGuardConfig
    from qkguard.training.trackers import Tracker


logger = logging.getLogger(__name__)


class QKGuardCallback(TrainerCallback):
    """Guards the queries and keys of a CoT-SFT run on TRL's SFTTrainer or transformers' Trainer.

    Keeps the pre-SFT W_Q and W_K of every softmax-attention layer, logs how far they drift, and writes a QK-restored
    model beside every raw checkpoint. Training itself is left alone: losses, weights and random streams are bit for
    bit those of a run without the callback.

        trainer = SFTTrainer(model=..., args=..., train_dataset=..., callbacks=[QKGuardCallback()])

    Args:
        config: settings; `overrides` replace single fields, so `QKGuardCallback(restore_on="end")` works alone.
        trackers: your own, beside those that the run reports to: objects with the methods of `trackers.Tracker`.

    Raises:
        QKGuardError: on a bad setting; and from `train()`, on all ranks, when the layout or the reference cannot be
            established. Later only a changed reference stops a run, unless `strict`.
    """

    def __init__(
        self, config: QKGuardConfig | None = None, *, trackers: Sequence[Tracker] = (), **overrides: Any
    ) -> None:
        from qkguard.training.config import QKGuardConfig  # here, because pydantic takes as long to import as the rest

        if not isinstance(config, QKGuardConfig | None):
            raise QKGuardError(
                f"Invalid config={config!r}: expected a QKGuardConfig. Single settings are keyword arguments: "
                'QKGuardCallback(restore_on="end").'
            )
        overrides = current_names(overrides)
        self.config = replace(config, **overrides) if config else QKGuardConfig(**overrides)
        self.trackers = list(trackers)
        self.session: Session | None = None
        show_log_lines()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.should_save:  # before `train(resume_from_checkpoint=True)` looks for the last checkpoint
            advice = "A checkpoint folder that holds nothing but qk_restored cannot be resumed from."
            with attempt("looking through the output folder", strict=False, advice=advice):
                for moved in set_aside_alone(Path(str(args.output_dir)), run_folder(self.config, args)):
                    logger.warning("A restored model whose checkpoint is gone was moved to %s.", moved)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        # a second train() starts from weights that have moved: the reference from before the first one stays
        if self.session is not None:  # an earlier train() may have ended in an exception
            self.session.background.finish(strict=False)
        if self.session is None or not self.session.guards(model, args):
            loader = kwargs.get("train_dataloader")
            dataset, collator = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
            tokenizer = kwargs.get("processing_class")
            self.session = Session(
                self.config, args, state, model, tokenizer, dataset, collator, trackers=self.trackers
            )
        self.session.begin(args, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.session:
            self.session.look(state.global_step)
            self.session.drift.measure(
                state.global_step,
                drift=is_due(self.config.drift_steps, state.global_step, control.should_log),
                routing=is_due(self.config.routing_drift_steps, state.global_step, control.should_log),
                beside=step_comes_next(state, control),
            )
            if control.should_save:  # a checkpoint without a reference could not be resumed
                self.session.reference_written()
            self.session.recall_monitor.at_step(state, control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.session:
            self.session.look(state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.session:
            self.session.drift.settle()
            self.session.final_verdict.keep_heldout(kwargs.get("eval_dataloader"))
            self.session.recall_monitor.at_evaluation(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (
            self.session
        ):  # an evaluation, a save or the loading of the best model may follow, whatever the step's end said
            self.session.drift.settle()
        if self.session and control.should_save:
            self.session.reference_written()
        if self.session and control.should_log:  # logging_strategy="epoch"; what a step logged has reset the flag
            self.session.drift.measure(
                state.global_step,
                drift=self.config.drift_steps == "logging",
                routing=self.config.routing_drift_steps == "logging",
            )

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        is_best = state.best_global_step == state.global_step
        restores = self.config.restore_on == "save" or (self.config.restore_on == "best" and is_best)
        if not self.session:
            return
        self.session.drift.settle()  # a run that is resumed from it never measures its step again
        checkpoint = self.session.note_save(args, state, restores=restores)
        if checkpoint is not None and restores:
            self.session.recall_monitor.at_save(state, control)
            self._restore(checkpoint, state.global_step, processing_class)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.session is None:
            return
        stopped_at = self.session.saved_unseen() if state.global_step < state.max_steps else None
        if stopped_at is not None and self.config.restore_on == "save":
            self._restore(stopped_at, int(stopped_at.name.removeprefix("checkpoint-")), processing_class)
        if stopped_at is None:
            self._end(state, control, processing_class, kwargs.get("train_dataloader"))
        self.session.background.finish()
        self.session.finish()

    def _end(self, state: TrainerState, control: TrainerControl, processing_class: Any, loader: Any) -> None:
        """Measure what the training came to, and write the final models; ALL ranks must call this."""
        assert self.session is not None
        step = self.session.note_end(state)
        self.session.drift.measure(
            step, drift=bool(self.config.drift_steps), routing=bool(self.config.routing_drift_steps)
        )
        self.session.recall_monitor.at_end(step, control)
        self.session.give_verdict(step, loader)
        self.session.background.finish()
        if self.config.final_export and self.config.restore_on != "never":
            with attempt("the final export", strict=self.config.strict, advice=LATER):
                self.session.final_export(state, processing_class)

    def _restore(self, checkpoint: Path, step: int, processing_class: Any) -> None:
        """Begin the restored model of a checkpoint; ALL ranks must call this."""
        assert self.session is not None
        with attempt(f"restoring {checkpoint}", strict=self.config.strict, advice=LATER):
            self.session.restore_checkpoint(checkpoint, step, processing_class)

    def save(self, trainer: Any, output_dir: str | Path, *, wait: bool = True) -> None:
        """`trainer.save_model(output_dir)`, and the restored model in `output_dir/qk_restored`.

        For scripts that save by hand, which fires no event. ALL ranks must call this.

            trainer.train()
            guard.save(trainer, "my-model")  # my-model, my-model/qk_restored

        Args:
            trainer: the trainer whose callback this is.
            output_dir: where to save.
            wait: return when the restored model is there; else it is made in the background, and a failure is logged.
                The end of the process waits for it.

        Raises:
            QKGuardError: before `train()` has begun, and when the restored model cannot be written.
        """
        if self.session is None:
            raise QKGuardError(
                "Nothing to restore from: the guard takes its reference when train() begins. Call save() after it."
            )
        self.session.background.finish()  # it may read the files that are about to be replaced
        trainer.save_model(str(output_dir))
        step = self.session.step_of_weights(trainer.state)
        folder = Path(output_dir).absolute()
        self.session.restore_saved(folder, step, trainer.processing_class, wait=wait)


def show_log_lines(*, whatever_root_shows: bool = False) -> None:
    """Show qkguard's own lines where the script has set up no logging; the root logger is left alone."""
    package = logging.getLogger("qkguard")
    if not package.handlers and (whatever_root_shows or not logging.getLogger().handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[qkguard] %(levelname)s %(message)s"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False
