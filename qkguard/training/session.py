"""One guarded training: what it starts from, what it measures on the way, what it writes at its saves.

The callback calls these methods on ALL ranks; files are the writers' work: rank 0, or one rank per node under
`save_on_each_node`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from qkguard.checkpoint.reference_file import REFERENCE, ReferenceFile
from qkguard.checkpoint.restored import plan_restored
from qkguard.checkpoint.staging import Staging
from qkguard.checkpoint.weights import open_weights
from qkguard.checkpoint.write import FolderPlan, Record, prepare, publish, write_files, write_folder
from qkguard.choice.swap import restored
from qkguard.distributed import collectives, ranks, sharding
from qkguard.errors import QKGuardError
from qkguard.layout import disk_names, find_attention, select
from qkguard.layout.selection import show_layers, unselected_norms
from qkguard.offline.task_rows import keep_rows
from qkguard.report.run import METRICS, RUN_FOLDER
from qkguard.restore.registry import check_per_layer, get_method
from qkguard.training.attempt import attempt
from qkguard.training.drift_monitor import DriftMonitor, Tracker
from qkguard.training.export import export_model, holds_weights, link_checkpoint
from qkguard.training.metrics_log import MetricsLog
from qkguard.training.probe_schedule import pace
from qkguard.training.recall_monitor import RecallMonitor, Swap
from qkguard.training.start import establish_reference, retire_later_checkpoints, warnings_at_start

if TYPE_CHECKING:  # pydantic doubles the time that `from qkguard import QKGuardCallback` takes
    from qkguard.training.config import QKGuardConfig

logger = logging.getLogger(__name__)

RESTORED = "qk_restored"


class Session:
    """Everything that belongs to one training: the reference, its drift, the files of the run folder.

    Raises:
        QKGuardError: on all ranks, when the model's layout, its sharding or its reference cannot be established.
    """

    def __init__(self, config: QKGuardConfig, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        started = time.perf_counter()
        self.config, self.output_dir = config, Path(str(args.output_dir))
        self.folder = run_folder(config, args)
        self.model: Any = sharding.unwrap(model)
        self.writes, self.each_node = bool(args.should_save), bool(args.save_on_each_node)
        flags = collectives.all_gather_table(torch.tensor([int(self.writes)])).flatten().tolist()
        writers = [rank for rank, flag in enumerate(flags) if flag] or [0]
        if not any(flags):
            self.writes = ranks.rank() == 0

        self.specs = ranks.agree("finding the attention layers", lambda: find_attention(self.model, spec=config.spec))[
            ranks.rank()
        ]
        self.selection = select(self.specs, config.rows)
        if not self.selection:
            raise QKGuardError(
                "no query or key rows are selected; check layers, projections and include_sliding_window"
            )
        check_per_layer(vars(config), self.selection)
        self.drift_monitor = self._establish(state, writers)
        self.drift: dict[str, float] = {}
        self._shared_disk: bool | None = None
        self.metrics_log: MetricsLog | None = None
        self.recall_monitor: RecallMonitor | None = None
        self._heldout = False
        self.begin(args, state)
        if ranks.rank() == 0:
            logger.info("%s", self._describe(args, time.perf_counter() - started))
            for warning in warnings_at_start(self.model, args):
                logger.warning("%s", warning)

    def _establish(self, state: TrainerState, writers: list[int]) -> Tracker:
        """What the run starts from, and what measures how far it has moved; a collective."""
        self.reference, self.origin = establish_reference(
            self.model, self.selection, self.folder, self.config, resumed=state.global_step > 0, writers=writers
        )
        return DriftMonitor(self.reference, self.selection)

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """(Re)open the run folder's metrics; on resume, set restored folders of a branch that was left aside."""

        def work() -> None:
            trackers = list(args.report_to or [])
            settings = self.config.to_json()
            self.metrics_log = MetricsLog(self.folder, trackers, self.output_dir, state.global_step, settings)
            if state.global_step:
                for moved in retire_later_checkpoints(self.output_dir, self.folder, state.global_step):
                    logger.warning("a restored checkpoint of a later step than the resumed one was moved to %s", moved)

        ranks.on_rank_zero("opening the run folder", work)

    def start_probes(self, args: TrainingArguments, state: TrainerState, tokenizer: Any, dataset: Any) -> None:
        """Recall before the first step; what to probe with is made once."""
        if self.recall_monitor is None:
            parts = (self.config, self.folder, self.model, self.restored_weights(), self.publish)
            self.recall_monitor = RecallMonitor(*parts, args, state, tokenizer, dataset)
        else:
            self.recall_monitor.begin(state)
        self.recall_monitor.at_start(state)

    def restored_weights(self) -> Swap | None:
        """What opens a context with restored queries and keys in the live model; None where nothing is restored."""
        config = self.config
        return lambda: restored(self.model, self.reference, method=config.method, **config.method_options)

    def probe_record(self) -> dict[str, Any]:
        """The last probes, for a manifest."""
        return {"probe": self.recall_monitor.summary} if self.recall_monitor and self.recall_monitor.summary else {}

    def keep_heldout(self, dataset: Any) -> None:
        """Rows of the evaluation set into the run folder, once; rank 0's work."""
        if not self._heldout and ranks.rank() == 0:
            try:
                keep_rows(dataset, self.folder)
            except Exception as error:
                logger.warning("rows of the evaluation set were not kept (%s); give `qkguard sweep` --data", error)
        self._heldout = True

    # -- measuring ---------------------------------------------------------------------------------------------------

    def measure(self, step: int, *, routing: bool) -> None:
        """Drift now, to every tracker."""
        started = time.perf_counter()
        details: dict[str, Any] = {}
        metrics = self.drift_monitor.measure(self.model)
        if routing:
            extra, heads = self.drift_monitor.measure_routing(self.model)
            metrics |= extra
            details["routing_rel_per_head"] = heads
        if any(value != value for value in metrics.values()) and ranks.rank() == 0:
            logger.warning("drift is not a number at step %d: the queries or keys hold NaN or Inf", step)
        self.drift = self.drift | metrics | {"step": step}
        metrics["qkguard/overhead/drift_seconds"] = time.perf_counter() - started
        self.publish(metrics, step, details)

    def publish(self, metrics: dict[str, float], step: int, details: dict[str, Any] | None = None) -> None:
        """One row of metrics to every tracker."""
        self._track(
            f"logging metrics at step {step}",
            lambda tracking: tracking.log(metrics, step, details),
            advice=f"what could be logged is in {self.folder / METRICS}",
        )

    def finish(self) -> None:
        """Training is over: the run's page, and its final numbers to the trackers."""
        probes = self.recall_monitor.summary if self.recall_monitor else {}
        summary = {
            f"recall_{which}": probes[which]["recall"] for which in ("before", "raw", "restored") if which in probes
        }
        summary |= {k.rpartition("/")[2]: v for k, v in self.drift.items() if k.count("/") == 2}
        self._track(
            "writing the run's page",
            lambda tracking: logger.info("the run's page: %s", tracking.write_page()),
            advice=f"`qkguard report {self.folder}` writes it later",
        )
        self._track(
            "sending the final numbers to the trackers",
            lambda tracking: tracking.summarise(summary),
            advice="they are on the run's page",
        )

    def _track(self, what: str, work: Callable[[MetricsLog], None], *, advice: str) -> None:
        """Rank 0's work for people to look at: a failure stops training, on all ranks, only if `strict`."""

        def on_rank_zero() -> None:
            if self.metrics_log is not None:
                work(self.metrics_log)

        if self.config.strict:
            ranks.on_rank_zero(what, on_rank_zero)
        else:
            attempt(what, on_rank_zero, strict=False, advice=advice)

    # -- writing -----------------------------------------------------------------------------------------------------

    def restore_checkpoint(self, checkpoint: Path, step: int, processing_class: Any) -> None:
        """`qk_restored/` inside a checkpoint that Trainer has just written, and `raw/` where it holds no weights."""
        started = time.perf_counter()
        raw = self._raw_of(checkpoint, processing_class)
        self._write_restored(raw, checkpoint / RESTORED, step)
        self.publish({"qkguard/overhead/save_seconds": time.perf_counter() - started}, step)
        if ranks.rank() == 0:
            logger.info("wrote %s (%.1f s)", checkpoint / RESTORED, time.perf_counter() - started)

    def final_export(self, state: TrainerState, args: TrainingArguments, processing_class: Any) -> None:
        """`final/raw` and `final/qk_restored`, linked from the checkpoint of the final weights where there is one."""
        started = time.perf_counter()
        final = self.folder / "final"
        best = args.load_best_model_at_end and state.best_model_checkpoint
        checkpoint = Path(best) if best else self.output_dir / f"checkpoint-{state.global_step}"

        def link() -> bool:
            source = next((c for c in (checkpoint, checkpoint / "raw") if holds_weights(c)), None)
            if source is None:
                return False
            if self.writes:
                link_checkpoint(source, final / "raw")
            return True

        linked = ranks.agree("linking the final checkpoint", lambda: link() if self.writes else True)
        if not all(linked):
            export_model(self.model, final / "raw", processing_class)
        self._write_restored(final / "raw", final / RESTORED, state.global_step)
        self.publish({"qkguard/overhead/save_seconds": time.perf_counter() - started}, state.global_step)
        if ranks.rank() == 0:
            logger.info("wrote %s (%.1f s)", final / "{raw,qk_restored}", time.perf_counter() - started)

    def _raw_of(self, checkpoint: Path, processing_class: Any) -> Path:
        """Where a checkpoint's raw weights are, after every rank has finished writing it."""
        held = ranks.agree("waiting for the checkpoint", lambda: holds_weights(checkpoint) if self.writes else True)
        if all(held):
            return checkpoint
        export_model(self.model, checkpoint / "raw", processing_class)
        return checkpoint / "raw"

    def _write_restored(self, raw: Path, out: Path, step: int) -> None:
        """ALL ranks must call this. Ranks that see rank 0's disk share the files, each of which is written once."""
        extra: dict[str, Any] = {"step": step, "drift": self.drift, **self.probe_record()}
        what = f"writing {out}"

        def write_alone() -> None:
            if self.writes:
                write_folder(self._plan_restored(raw, out), extra)

        if self.each_node:  # every node has its own disk and its own copy of the raw files
            ranks.agree(what, write_alone)
            return

        def begin() -> tuple[FolderPlan, Staging]:
            plan = self._plan_restored(raw, out)
            return plan, prepare(plan)

        begun = ranks.held_by(0, what, begin)

        def write_share() -> list[Record]:
            if ranks.rank() >= world:
                return []
            plan = begun[0] if begun else self._plan_restored(raw, out)
            return write_files(plan, ranks.rank(), world)

        def finish(records: list[Record]) -> None:
            if begun:
                publish(*begun, records, extra)

        with begun[1] if begun else nullcontext():  # what is not published is removed
            world = ranks.world_size() if self._disk_is_shared() else 1
            shares = ranks.agree(what, write_share)
            ranks.on_rank_zero(what, partial(finish, [record for share in shares for record in share]))

    def _plan_restored(self, raw: Path, out: Path) -> FolderPlan:
        """What restoring changes in the files of `raw`; reads their headers, the same on every rank."""
        weights = open_weights(raw)
        maps = [pmap for _, pmaps in self.selection for pmap in pmaps]
        if get_method(self.config.method).needs_gains(vars(self.config)):
            maps += unselected_norms(self.selection)
        return plan_restored(
            weights,
            out,
            self.selection,
            disk_names(maps, weights.shapes(), self.model),
            ReferenceFile(self.folder),
            method=self.config.method,
            options=self.config.method_options,
            rows=self.config.rows,
            staging=self.folder,
            overwrite=True,
        )

    def _disk_is_shared(self) -> bool:
        """Whether every rank sees what rank 0 writes to the run folder; asked once."""
        if self._shared_disk is None:

            def leave_token() -> Path:
                token = self.folder / f"_{uuid.uuid4().hex}"
                token.touch()
                return token

            token = ranks.on_rank_zero("looking for a shared disk", leave_token)
            self._shared_disk = all(ranks.agree("looking for a shared disk", token.exists))
            ranks.on_rank_zero("looking for a shared disk", token.unlink)
        return self._shared_disk

    def _describe(self, args: TrainingArguments, seconds: float) -> str:
        layers = [spec.layer for spec, _ in self.selection]
        total = getattr(self.model.config, "num_hidden_layers", None)
        maps = self.reference.maps.values()
        kept = sum(m.numel * self.reference.slices[m.name].element_size() for m in maps)
        share = "" if ranks.world_size() == 1 else f", {_megabytes(self.reference.nbytes)} of it on this rank"
        config = self.config
        return (
            f"guarding the queries and keys of {len(layers)} softmax-attention layers"
            + (f" of {total} layers" if total else "")
            + f" ({show_layers(layers)}): {sum(m.numel for m in maps):,} elements in {len(maps)} parameters, "
            f"{_megabytes(kept)} kept in CPU memory{share}. Reference {self.folder / REFERENCE}: "
            f"{self.origin} ({seconds:.1f} s). Drift {pace(config.drift_steps)}, routing drift "
            f"{pace(config.routing_drift_steps)}, to {', '.join([METRICS, *(args.report_to or [])])}. "
            f"Restored checkpoints ({config.method}): {self._when(f'checkpoint-N/{RESTORED}')}."
        )

    def _when(self, place: str) -> str:
        """When restored models are written to `place`, and where the final ones go."""
        config = self.config
        final = config.final_export and config.restore_on != "never"
        saves = {"save": f"{place} at every save", "best": f"{place} at every best save"}
        when = saves.get(config.restore_on, "none before the end" if final else "none")
        return when + (f", final models in {self.folder / 'final'}" if final else "")


def run_folder(config: QKGuardConfig, args: TrainingArguments) -> Path:
    """Where a run's reference, metrics and final models go."""
    return config.output_dir or Path(str(args.output_dir)) / RUN_FOLDER


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
