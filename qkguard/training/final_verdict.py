"""The verdict when training ends: raw and restored weights measured in the live model, and which folder to ship.

ALL ranks must call every method, unless it says otherwise. Nothing of the training changes: weights are swapped and
put back to the bit, rows are copies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkguard.choice.candidates import Candidate
from qkguard.choice.task import TaskRow, encode_rows
from qkguard.choice.verdict import Interval, Measurement, Verdict, compare, recommend
from qkguard.distributed import ranks, sharding
from qkguard.offline.task_rows import HELDOUT, SEEN, Tokenised, keep_rows
from qkguard.probe.words import floor_clause
from qkguard.report.numbers import plural
from qkguard.training.agreed_probe import AgreedProbe
from qkguard.training.attempt import attempt
from qkguard.training.loader_rows import ROW_TOKENS, fewer_rows, rows_of
from qkguard.training.probe_rows import RAW, RESTORED, summary_of
from qkguard.training.recall_monitor import Publish, RecallMonitor
from qkguard.training.run_folder import FINAL

if TYPE_CHECKING:
    from qkguard.training.adapter_weights import AdapterWeights
    from qkguard.training.config import QKGuardConfig
    from qkguard.training.full_weights import FullWeights

logger = logging.getLogger(__name__)

UNTOUCHED = Candidate("raw", "raw")
TOKENS = 65_536
"""The loss of one model is measured on rows of about so many tokens together, at most, and of no more than a pass of
the probe: every model of the verdict reads them."""

SEED = 0  # of the intervals, as `sweep` has it by default
LATER = "`qkguard sweep` measures it on the final models."
NO_ROWS = (
    "Task loss was not measured: there is no evaluation set, and no rows could be copied from the training data. The "
    "recommendation goes by recall alone."
)


@dataclass(kw_only=True)
class RunVerdict(Verdict):
    """The verdict of a run.

    Attributes:
        written: what the final restored folder holds.
        folder: the better one of the final folders, by the same rule on the two points that they hold.
        notes: sentences after the recommendation.
        seconds: what the measurement took.
    """

    written: Candidate
    folder: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def words(self) -> list[str]:
        return [*super().words, *self.notes]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for `metrics.jsonl` and the page."""
        return {
            "recommended": self.recommended.name,
            "folder": self.folder,
            "words": self.words,
            "rule": self.rule,
            "metric": self.metric,
            "data": self.data,
            "tolerance": self.tolerance,
            "points": [point.to_json(self.tolerance) for point in self.points],
        }

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"folder": self.folder, "data": self.data}

    def probe_of_written(self, step: int) -> dict[str, Any]:
        """What manifests say of the recall of `written`: under "restored", as the recall monitor has it."""
        raw, found = (next(p.probe for p in self.points if p.candidate == c) for c in (UNTOUCHED, self.written))
        if self.written == UNTOUCHED:
            return {}
        return {"restored": summary_of(found) | {"step": step, "change": found.change_since(raw)}}

    @property
    def models(self) -> dict[str, Measurement]:
        """Every point but the base, by a name without blanks."""
        return {point.name.replace(" ", "_"): point for point in self.points if point.candidate.kind != "base"}

    def metrics(self) -> dict[str, float]:
        """One row of metrics: recall, and loss where it was measured, of every point."""
        out: dict[str, float] = {}
        for name, point in self.models.items():
            out[f"qkguard/verdict/{name}/recall"] = point.recall.value
            if point.task is not None:
                out[f"qkguard/verdict/{name}/loss"] = point.task.loss
        return out | {"qkguard/overhead/verdict_seconds": self.seconds}

    def intervals(self) -> dict[str, float]:
        """The 95% intervals of recall, and of what it gains on raw, for trackers' summaries."""
        out: dict[str, float] = {}
        for name, point in self.models.items():
            out |= {f"{name}/recall_{end}": getattr(point.recall, end) for end in ("low", "high")}
            out |= {f"{name}/gain_{end}": getattr(point.gain, end) for end in ("value", "low", "high")}
        return out

    def measured(self) -> str:
        """All points with their intervals, on one line, and which rows the loss is of."""
        rows = [f"loss over {self.data}"] if self.data else []
        return "; ".join([*map(_numbers, self.models.values()), *rows])


def _numbers(point: Measurement) -> str:
    said = f"{point.name} recall {_spread(point.recall)}"
    if point.task is None or point.quality is None:
        return said
    loss = Interval(point.task.loss, -point.quality.high, -point.quality.low)
    return f"{said}, loss {_spread(loss)}"


def _spread(found: Interval) -> str:
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


class FinalVerdict:
    """Measures the verdict of one `train()`.

    Args:
        config: the guard's settings.
        folder: the run folder, where the rows that the loss was measured on are kept.
        model: the unwrapped model.
        weights: says which restores there are, and swaps them into the model.
        monitor: the recall monitor, whose samples and last probes are used.
    """

    def __init__(
        self,
        config: QKGuardConfig,
        folder: Path,
        model: Any,
        weights: FullWeights | AdapterWeights,
        monitor: RecallMonitor,
    ) -> None:
        self.config, self.folder, self.model, self.weights, self.monitor = config, folder, model, weights, monitor
        self._heldout: list[Tokenised] | None = None  # rank 0's; None until there was an evaluation
        monitor.costs.extra_at_end = self._passes()

    def _passes(self) -> int:
        """Over the probe's samples, beyond those of the monitor when training ends: the probes' budget plans them."""
        if not self.config.verdict:
            return 0
        known = 0 if self.monitor.swap is None else 1
        return max(0, len(self.weights.candidates()) - known)

    def keep_heldout(self, loader: Any) -> None:
        """Keep rows of the evaluation set in the run folder, once; rank 0's work, for `qkguard sweep` too."""
        if self._heldout is not None or ranks.rank() != 0:
            return
        try:
            self._heldout = rows_of(loader)
            keep_rows(self._heldout, self.folder / HELDOUT)
        except Exception as error:
            self._heldout = self._heldout or []
            logger.warning("Rows of the evaluation set were not kept (%s). Give `qkguard sweep` --data.", error)

    def why_not(self) -> str | None:
        """What keeps a verdict from being measured, in a clause; None where nothing does. The same on all ranks."""
        if not self.config.verdict:
            return "verdict is False"
        if self.monitor.prober is None:
            return "recall is not probed"
        if not self.weights.candidates():
            return "nothing can be restored in the live model"
        if self.monitor.baseline is not None and self.monitor.at_floor:
            found = self.monitor.baseline.total
            return floor_clause(found.hits, found.count, "before training the model")
        return None

    def announcement(self) -> str:
        """What will be measured at the end and about how long that takes, for the log; "" without a verdict."""
        if self.why_not() is not None:
            return ""
        names = [UNTOUCHED.name, *(candidate.name for candidate in self.weights.candidates())]
        recall = self.monitor.expected_seconds * len(names)
        asked = self._tokens_of_probe()
        most = recall * (1 + min(TOKENS, asked) / asked)
        took = "less than a second" if most < 1 else f"{recall:.0f} to {most:.0f} s"
        return (
            f"When training ends, a verdict is measured: recall and loss of {', '.join(names)}. By the first probe's "
            f"time it takes {took}, the more the longer the rows are. Set verdict=False to leave it out."
        )

    def _tokens_of_probe(self) -> int:
        """Tokens of all samples that a pass asks, as far as they have been cut down."""
        prober = self.monitor.prober
        return sum(key.length for key in prober.sample_keys) if prober is not None else TOKENS

    def give(self, step: int, train_loader: Any, publish: Publish) -> RunVerdict | None:
        """Measure the verdict and tell it: log, metrics, trackers; None where there is none. ALL ranks must call this.

        A failure is logged, and ends the run only if `strict`.
        """
        why = self.why_not()
        if why is None and self.monitor.result_at(step, RAW) is None:
            why = "the last probe failed"
        if why is None:
            with attempt("the verdict", strict=self.config.strict, advice=LATER):
                verdict = self._measure(step, train_loader)
                publish(verdict.metrics(), step, {"verdict": verdict.to_json()})
                if ranks.rank() == 0:
                    logger.info("Verdict, measured in %.1f s: %s.", verdict.seconds, verdict.measured())
                    logger.info("%s", " ".join(verdict.words))
                    logger.info("The rule: %s.", verdict.rule)
                return verdict
        elif ranks.rank() == 0 and self.config.method == "auto":
            logger.warning('No verdict on which model to ship: %s. method="auto" writes a plain restore.', why)
        elif ranks.rank() == 0 and self.monitor.baseline is not None and self.config.verdict:
            logger.info("No verdict on which model to ship: %s. Use the raw model unless you measure otherwise.", why)
        return None

    def _measure(self, step: int, train_loader: Any) -> RunVerdict:
        """Recall and loss of every point, and the rule applied to them; ALL ranks must call this.

        Recall that the monitor has just probed is not probed again.
        """
        began = time.perf_counter()
        rows, data = ranks.on_rank_zero("taking rows for the verdict", partial(self._rows, train_loader))
        points = [self._measured(point, step, rows) for point in (UNTOUCHED, *self.weights.candidates())]
        if self.monitor.baseline is not None:
            before = self.monitor.baseline.only(points[0].probe.sample_keys)
            points.insert(0, Measurement(Candidate("base", "base"), before, None))
        compare(points, SEED)
        tolerance, usual = self.config.tolerance, self.weights.usual
        best = recommend(points, tolerance)
        verdict = RunVerdict(points=points, recommended=best, tolerance=tolerance, data=data, written=usual)
        verdict.notes = [] if rows else [NO_ROWS]
        if self.config.final_export and self.config.restore_on != "never":
            self._choose_folder(verdict)
        verdict.seconds = time.perf_counter() - began
        return verdict

    def _choose_folder(self, verdict: RunVerdict) -> None:
        """What the final restored folder will hold, and which of the final folders is recommended."""
        best, usual, restored = verdict.recommended, self.weights.usual, self.weights.restored_folder
        if self.config.method == "auto":
            verdict.written = best.candidate
        held = [p for p in verdict.points if p.candidate in (UNTOUCHED, verdict.written)]
        better = recommend(held, verdict.tolerance).candidate
        verdict.folder = "raw" if better == UNTOUCHED or restored is None else restored
        if restored is None and best.candidate != UNTOUCHED:
            note = "It has no form as an adapter; merge_at_end=True writes it merged."
        elif restored is None or (best.candidate == verdict.written == UNTOUCHED and not self.weights.writable):
            note = f"It is in {FINAL}/raw."
        elif best.candidate == verdict.written == UNTOUCHED:
            note = f'{FINAL}/{restored} is {FINAL}/raw under another name (method="auto").'
        elif best.candidate == verdict.written:
            note = f"It is in {FINAL}/{restored}."
        elif best.candidate == UNTOUCHED:
            note = f"It is in {FINAL}/raw; {FINAL}/{restored} holds {usual.name}, as asked."
        else:
            note = (
                f"{FINAL}/{restored} holds {usual.name}, as asked; of the two final folders, {FINAL}/{verdict.folder} "
                f'is recommended. method="auto" writes {best.name}; `qkguard restore` makes it from {FINAL}/raw.'
            )
        verdict.notes.append(note)

    def _measured(self, candidate: Candidate, step: int, rows: Sequence[TaskRow]) -> Measurement:
        """One point in the live model; ALL ranks must call this. The weights are as before whatever happens."""
        assert self.monitor.prober is not None
        probe = None
        if candidate in (UNTOUCHED, self.weights.usual):
            probe = self.monitor.result_at(step, RAW if candidate is UNTOUCHED else RESTORED)
            if probe is not None and probe.sample_keys != self.monitor.prober.sample_keys:
                probe = None
        what = f"measuring {candidate.name} for the verdict"
        try:
            with nullcontext() if candidate is UNTOUCHED else self.weights.swapped(candidate):
                agreed = AgreedProbe(what, self.monitor.prober, self.model)
                probe = probe or agreed.run()
                return Measurement(candidate, probe, agreed.score(rows) if rows else None)
        finally:
            sharding.settle(self.model)

    def _rows(self, train_loader: Any) -> tuple[list[TaskRow], str]:
        """The rows that the loss is of, and what they are in words; rank 0's work."""
        found, what = self._heldout, "{} of the evaluation set"
        if not found:
            found, what = rows_of(train_loader), "{} seen in training"
            keep_rows(found, self.folder / SEEN)
        if not found:
            return [], ""
        rows, _ = encode_rows(None, fewer_rows(found, min(TOKENS, self._tokens_of_probe())), ROW_TOKENS)
        return rows, what.format(plural(len(rows), "row"))
