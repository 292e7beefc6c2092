"""A guarded training: what it starts from, what it measures on the way, what it writes at its saves.

The callback calls these methods on ALL ranks. Files are written by `Writers`: rank 0, or one rank per node.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerState, TrainingArguments

from qkguard.checkpoint.files import write_text
from qkguard.distributed import ranks, sharding
from qkguard.distributed.reference import Reference
from qkguard.errors import QKGuardError, reason_of
from qkguard.layout import find_attention, select
from qkguard.layout.selection import Selection
from qkguard.layout.spec import AttentionSpec
from qkguard.offline.task_rows import HELDOUT
from qkguard.probe.retrieval import RetrievalChoice
from qkguard.report.run import METRICS, RETRIEVAL_LAYERS
from qkguard.restore.registry import check_per_layer
from qkguard.training.attempt import LATER, attempt
from qkguard.training.background import BackgroundWriter, Save, Write
from qkguard.training.drift_log import DriftLog
from qkguard.training.final_verdict import FinalVerdict, RunVerdict
from qkguard.training.full_weights import FullWeights
from qkguard.training.metrics_log import MetricsLog, Tracker
from qkguard.training.recall_monitor import RecallMonitor
from qkguard.training.reference import PendingReference, establish_reference
from qkguard.training.resume import SeenSaves, remove_leftovers, saved_folder, set_aside, set_aside_restored
from qkguard.training.retrieval_layers import settle_layers
from qkguard.training.run_folder import FINAL, RECOMMENDED, RESTORED, run_folder
from qkguard.training.start_checks import warnings_at_start
from qkguard.training.start_lines import files_line, schedule_line
from qkguard.training.writers import Writers

if TYPE_CHECKING:  # pydantic and PEFT double the time that `from qkguard import QKGuardCallback` takes
    from qkguard.training.adapter_weights import AdapterWeights
    from qkguard.training.config import QKGuardConfig

logger = logging.getLogger(__name__)


class Session:
    """The guard of one model and one run folder, over one `train()` or several.

    `__init__` sets up what a second `train()` of the same model keeps: the layout, the reference from before the first
    one, the recall monitor with its baseline. `begin` starts all that belongs to one `train()`.

    Attributes:
        reference: the queries and keys from before SFT that are restored; None for adapters, which need none.
        pending: its file, which is written and compared with the base beside the first steps; None for adapters.
        background: makes the restored models of saves beside the training.
        weights: how full weights, or adapters, are measured, swapped and written.
        recall_monitor: probes recall.
        metrics_log: rank 0's log of this `train()`; None on other ranks.
        drift: measures drift in this `train()`.
        final_step: once training has ended, the step that the live weights are from.
        saved: step -> the checkpoint that Trainer saved then, of this `train()`.
        final_verdict: measures which model to ship when this `train()` ends.
        verdict: what it found; None before, and where there is none.
        retrieval: which layers `layers="retrieval"` stands for; None with other settings, and before it is settled.

    Raises:
        QKGuardError: on all ranks, when the model's layout, its sharding or its reference cannot be established.
    """

    def __init__(
        self,
        config: QKGuardConfig,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        processing_class: Any = None,
        dataset: Any = None,
        collator: Any = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        started = time.perf_counter()
        self.config, self.folder, self.trackers = config, run_folder(config, args), trackers
        self.model: Any = sharding.unwrap(model)
        self.writers = Writers.of(args)
        self.background = BackgroundWriter(config.strict, self._note_write)
        self.selection = _find_selection(self.model, config)
        self.reference: Reference | None = None
        self.pending: PendingReference | None = None
        self.weights: FullWeights | AdapterWeights
        if hasattr(self.model, "peft_config"):
            from qkguard.training.adapter_weights import AdapterWeights  # imports PEFT

            self.weights = AdapterWeights(
                config, self.model, self.folder, self.writers, self.selection, self.background
            )
        else:
            resumed = state.global_step > 0
            self.reference, self.pending = establish_reference(
                self.model, self.selection, self.folder, config, resumed=resumed, writers=self.writers.ranks
            )
            origin = ", ".join(filter(None, (self.pending.origin, self.pending.compared)))
            self.weights = FullWeights(
                config, self.model, self.folder, self.writers, self.reference, origin, self.background
            )
        self.retrieval: RetrievalChoice | None = None
        self._log_start(args, collator, time.perf_counter() - started)
        swap, publish = self.weights.swap, self.publish
        self.recall_monitor = RecallMonitor(
            config, self.folder, self.model, swap, publish, args, processing_class, dataset
        )

    def _log_start(self, args: TrainingArguments, collator: Any, seconds: float) -> None:
        if ranks.rank() != 0:
            return
        weights, config = self.weights, self.config
        place, merges = weights.restored_place, weights.merges()
        drifts, restores = weights.drift_monitor is not None, place is not None
        for line in (
            *weights.describe(seconds),
            schedule_line(config, args, drifts=drifts, restores=restores),
            files_line(config, args, self.folder, place, merges),
        ):
            logger.info("%s", line)
        for warning in warnings_at_start(self.model, args, collator):
            logger.warning("%s", warning)

    def guards(self, model: nn.Module, args: TrainingArguments) -> bool:
        """Whether a `train()` that begins continues to train this model into this run folder."""
        return self.model is sharding.unwrap(model) and self.folder == run_folder(self.config, args)

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """Start what belongs to one `train()`, and probe recall before its first step; ALL ranks must call this."""
        self.output_dir = Path(str(args.output_dir)).absolute()  # a script may chdir
        # Uploads to the hub leave out what begins with "_" here, and nothing in checkpoints.
        self.weights.staging = self.output_dir
        self.saved: dict[int, Path] = {}
        self._seen_saves = SeenSaves()
        self.reloads_best = bool(args.load_best_model_at_end)
        monitor, strict = self.weights.drift_monitor, self.config.strict
        self.drift = DriftLog(monitor, self.model, self.publish, self.raise_owed, strict=strict)
        self.final_step: int | None = None
        self._owed: QKGuardError | None = None
        self.metrics_log = ranks.agree("opening the run folder", partial(self._open_folders, args, state))
        self._last_step = state.global_step
        self.final_verdict = FinalVerdict(self.config, self.folder, self.model, self.weights, self.recall_monitor)
        self.verdict: RunVerdict | None = None
        self.recall_monitor.at_start(args, state)
        self._settle_layers(state)
        if ranks.rank() == 0 and (line := self.final_verdict.announcement()):
            logger.info("%s", line)

    def _settle_layers(self, state: TrainerState) -> None:
        """What `layers="retrieval"` stands for in this run, before anything is restored; ALL ranks must call this."""
        if not self.config.wants_retrieval_layers:
            return
        if self.retrieval is None:
            untrained, strict = state.global_step == 0, self.config.strict
            self.retrieval = settle_layers(
                self.weights, self.recall_monitor, self.folder, untrained=untrained, strict=strict
            )
            if isinstance(self.weights, FullWeights):
                self.reference = self.weights.restorable
        self.publish({}, state.global_step, {"retrieval": self.retrieval.to_json()})

    def _open_folders(self, args: TrainingArguments, state: TrainerState) -> MetricsLog | None:
        """Clear up after earlier trainings on every writer, and open rank 0's log."""
        if self.writers.here:
            remove_leftovers(self.output_dir, self.folder)
        if ranks.rank() != 0:
            return None
        at = state.global_step
        # of an earlier training, which may have had other data and settings
        for name in [HELDOUT] if self.retrieval is not None else [HELDOUT, RETRIEVAL_LAYERS]:
            if at == 0 and (self.folder / name).is_file():
                set_aside(self.folder / name, self.folder, name)
        log = MetricsLog(self.folder, args.report_to or [], self.output_dir, at, self.config.to_json(), self.trackers)
        for moved in set_aside_restored(self.output_dir, self.folder, at):
            logger.warning("A restored model that an earlier training left was moved to %s.", moved)
        return log

    # -- measuring ---------------------------------------------------------------------------------------------------

    def give_verdict(self, step: int, train_loader: Any) -> None:
        """Training has ended: measure which model to ship, and say so; ALL ranks must call this."""
        self.verdict = self.final_verdict.give(step, train_loader, self.publish)

    def publish(self, metrics: dict[str, float], step: int, details: dict[str, Any] | None = None) -> None:
        """Write one row of metrics, and send it to the trackers; ALL ranks must call this."""

        def write_row(log: MetricsLog) -> None:
            log.log(metrics, step, details)

        advice = f"What could be logged is in {self.folder / METRICS}."
        self._show(f"logging metrics at step {step}", write_row, advice)

    def finish(self) -> None:
        """Training is over: write the run's page, and send its final numbers to the trackers; ALL ranks."""
        self.drift.close()
        summary = self._summary()

        def write_page(log: MetricsLog) -> None:
            if log.path.exists():  # else nothing was measured: there is nothing to show
                logger.info("The run's page: %s", log.write_page())

        def send_summary(log: MetricsLog) -> None:
            log.summarise(summary)

        self._show("writing the run's page", write_page, f"`qkguard report {self.folder}` writes it later.")
        self._show("sending the final numbers to the trackers", send_summary, "They are on the run's page.")
        ranks.agree("ending the guard", self.raise_owed)
        self.reference_written()

    def _summary(self) -> dict[str, float | str]:
        """The final numbers: recall before and after, drift over all layers, and the verdict."""
        probes = self.recall_monitor.summary
        summary: dict[str, float | str] = {
            f"recall_{which}": probes[which]["recall"] for which in ("before", "raw", "restored") if which in probes
        }
        over_layers = {key: value for key, value in self.drift.last.items() if key.count("/") == 2}
        summary |= {key.rpartition("/")[2]: value for key, value in over_layers.items()}
        if self.verdict is not None:
            summary |= {"recommended": self.verdict.recommended.name, "verdict": " ".join(self.verdict.words)}
            summary |= {"rule": self.verdict.rule, **self.verdict.intervals()}
        return summary

    def _show(self, what: str, work: Callable[[MetricsLog], None], advice: str) -> None:
        """Rank 0's work for people to look at, for which no rank waits: a failure is logged, or owed if `strict`."""
        if self.metrics_log is None:
            return
        try:
            with attempt(what, strict=self.config.strict, advice=advice):
                work(self.metrics_log)
        except Exception as error:
            self.owe(what, error)

    def owe(self, what: str, error: Exception) -> None:
        """Keep a failure of this rank alone, to raise it on all ranks where they meet next."""
        if self._owed is None:
            kind = type(error) if isinstance(error, QKGuardError) else QKGuardError
            self._owed = kind(f"{what} failed on rank {ranks.rank()}: {reason_of(error)}")
            self._owed.complete = True

    def raise_owed(self) -> None:
        """Raise what this rank owes; to be called where all ranks agree."""
        if self.pending is not None:
            self.pending.check()
        if self._owed is not None:
            raise self._owed

    def reference_written(self) -> None:
        """Wait until the reference is on disk and compared with the base: before anything is saved; ALL ranks."""
        if self.pending is not None:
            self.pending.wait()

    def saved_unseen(self) -> Path | None:
        """What Trainer saved last, if it was without an event, as SIGTERM stopped it; ALL ranks must call this."""
        return ranks.on_rank_zero("looking for the last save", partial(self._seen_saves.unseen, self.output_dir))

    def note_end(self, state: TrainerState) -> int:
        """Training is over: find out which step the live weights are from; ALL ranks must call this."""
        self.final_step = state.global_step
        if self.reloads_best:  # rank 0's answer: other ranks may see no checkpoint
            self.final_step = ranks.on_rank_zero("finding the best checkpoint", partial(_step_loaded, state))
        return self.final_step

    def step_of_weights(self, state: TrainerState) -> int:
        """The step that the live weights are from."""
        return state.global_step if self.final_step is None else self.final_step

    # -- writing -----------------------------------------------------------------------------------------------------

    def note_save(self, args: TrainingArguments, state: TrainerState, *, restores: bool) -> Path | None:
        """Find the checkpoint that Trainer has just written, None if this fails; ALL ranks must call this.

        If it is not restored, what an earlier training left in it does not stay beside the new weights.
        """
        self.reference_written()
        # Trainer writes below a relative output_dir from wherever the script is by now
        places = (self.output_dir, Path(str(args.output_dir)).absolute())

        def find() -> Path:
            self.raise_owed()
            return self._seen_saves.note(saved_folder(list(dict.fromkeys(places)), state))

        checkpoint = None
        with attempt("finding the checkpoint", strict=self.config.strict, advice=LATER):
            checkpoint = ranks.on_rank_zero("finding the checkpoint", find)
        if checkpoint is None:
            return None
        self.saved[state.global_step] = checkpoint
        left = checkpoint / RESTORED
        if not restores and self.writers.here and left.exists():
            with attempt(f"moving {left}", strict=self.config.strict, advice="It is not made from the new weights."):
                moved = set_aside(left, self.folder, checkpoint.name)
                logger.warning("A restored model that an earlier training left was moved to %s.", moved)
        return checkpoint

    def restore_checkpoint(self, checkpoint: Path, step: int, processing_class: Any) -> None:
        """Begin the restored model of a checkpoint that Trainer has just written; ALL ranks must call this.

        The training waits for an earlier one, and until the raw files are known to be whole.
        """
        started = time.perf_counter()
        self.background.finish()
        save = Save(step, self._record(step), checkpoint)
        written = self.weights.write_checkpoint(checkpoint, save, processing_class)
        self._report_save(written, save, time.perf_counter() - started)

    def look(self, step: int) -> None:
        """Put restored models that were made meanwhile in their places; at the trainer's events, nobody waits."""
        self._last_step = step
        self.background.look()

    def restore_saved(self, folder: Path, step: int, processing_class: Any, *, wait: bool) -> None:
        """The restored model of a folder that the user had saved by hand; ALL ranks must call this.

        Raises:
            QKGuardError: it cannot be written; without `wait` only what fails before the write begins is raised.
        """
        started = time.perf_counter()
        self.reference_written()
        chosen = self.verdict.written if self.verdict else None  # by hand, after the end
        save = Save(step, self._record(step), awaited=wait, chosen=chosen)
        written = self.weights.write_checkpoint(folder, save, processing_class)
        if wait:
            self.background.finish(strict=True)
        self._report_save(written, save, time.perf_counter() - started)

    def final_export(self, state: TrainerState, processing_class: Any) -> None:
        """Write the final raw and restored models; ALL ranks must call this.

        They are linked from the checkpoint of the final weights if this `train()` saved one, else taken from the live
        weights: a folder of that name may be another run's.
        """
        self.reference_written()
        started, step = time.perf_counter(), self.step_of_weights(state)
        source = self.saved.get(step)
        final, chosen = self.folder / FINAL, self.verdict.written if self.verdict else None
        save = Save(step, self._record(step), awaited=True, chosen=chosen)
        written = self.weights.write_final(final, source, save, processing_class)
        if self.verdict is not None:
            name = partial(write_text, final / RECOMMENDED, f"{self.verdict.folder}\n")
            self.writers.run("naming the recommended folder", name)
        self._report_save(written, save, time.perf_counter() - started)

    def _record(self, step: int) -> dict[str, Any]:
        """What manifests say of the training so far; a copy, because that goes on. ALL ranks must call this."""
        self.drift.settle()
        record: dict[str, Any] = {"step": step, "drift": self.drift.last}
        probes = self.recall_monitor.summary
        if self.retrieval is not None:
            record["retrieval"] = self.retrieval.summary()
            record |= {"warnings": [self.retrieval.words]} if self.retrieval.layers is None else {}
        if self.verdict is not None:
            record["verdict"] = self.verdict.summary()
            if self.verdict.written != self.weights.usual:  # the monitor has probed another restore
                probes = {k: v for k, v in probes.items() if k != "restored"} | self.verdict.probe_of_written(step)
        return deepcopy(record | ({"probe": probes} if probes else {}))

    def _report_save(self, written: list[Path], save: Save, seconds: float) -> None:
        """Of what a save kept the training waiting; ALL ranks must call this."""
        if not written:
            return
        self.publish({"qkguard/overhead/save_seconds": seconds}, save.step)
        if ranks.rank() == 0 and save.awaited:
            logger.info("Wrote %s (%.1f s).", ", ".join(map(str, written)), seconds)

    def _note_write(self, write: Write) -> None:
        """A write has ended beside the training, of which rank 0's metrics tell; the other ranks are not asked."""
        if self.metrics_log is None:
            return
        metrics = {"qkguard/overhead/save_background_seconds": max(0.0, write.seconds - write.waited)}
        advice = f"What could be logged is in {self.folder / METRICS}."
        with attempt("logging metrics of a save", strict=False, advice=advice):
            self.metrics_log.log(metrics, max(self._last_step, write.save.step), {"saved_step": write.save.step})


def _step_loaded(state: TrainerState) -> int:
    """The step of the weights that Trainer leaves at the end under `load_best_model_at_end`."""
    best = state.best_model_checkpoint
    number = Path(best).name.removeprefix("checkpoint-") if best and Path(best).is_dir() else ""
    return int(number) if number.isdigit() else state.global_step


def _find_selection(model: Any, config: QKGuardConfig) -> Selection:
    """The layers to guard, and which of their rows are queries and keys; ALL ranks must call this."""

    def find() -> list[AttentionSpec]:
        sharding.refuse_wrappers(model)
        return find_attention(model, spec=config.spec)

    specs = ranks.agree("finding the attention layers", find)
    selection = select(specs, config.rows)
    if not selection:
        raise QKGuardError(
            "No query or key rows are selected. Check the settings layers, projections and include_sliding_window."
        )
    check_per_layer(vars(config), selection)
    return selection
