"""Recall probes of a guarded training: when, on which samples, and what follows from a fall.

ALL ranks must call every method. Samples are divided over them; a failure on one rank becomes everybody's, except
inside a sharded forward pass, where the others wait in an all-gather: there the run ends.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from tqdm.auto import tqdm
from transformers import IntervalStrategy, TrainerControl, TrainerState, TrainingArguments

from qkguard.checkpoint.files import read_json, write_json
from qkguard.distributed import ranks, sharding
from qkguard.probe.alerts import Fall
from qkguard.probe.prober import Prober
from qkguard.probe.results import ProbeResult
from qkguard.probe.settings import default_lengths, lengths_left_out
from qkguard.probe.statistics import at_floor
from qkguard.probe.thinning import thin
from qkguard.probe.words import floor_clause
from qkguard.training.agreed_probe import AgreedProbe
from qkguard.training.attempt import attempt
from qkguard.training.probe_costs import ProbeCosts
from qkguard.training.probe_rows import RAW, RESTORED, details_of, line_of, metrics_of, summary_of
from qkguard.training.probe_setup import make_prober, why_not
from qkguard.training.recall_alert import RecallAlert, say_where_impossible
from qkguard.training.schedules import interval

if TYPE_CHECKING:  # pydantic doubles the time that `from qkguard import QKGuardCallback` takes
    from qkguard.training.config import QKGuardConfig

logger = logging.getLogger(__name__)

STATE = "probe.json"
ADVICE = "Change the probe_* settings or set probe_steps=0; `qkguard probe` measures finished checkpoints."
BAR_AFTER = 1.0  # seconds of a probe before a progress bar is drawn
T = TypeVar("T")
Swap = Callable[[], AbstractContextManager[None]]
Publish = Callable[[dict[str, float], int, dict[str, Any]], None]


@dataclass
class _Training:
    """What begins anew with each `train()`: its schedule, what it has probed, and what it has told."""

    every: int | None
    """Steps between scheduled probes; None where evaluations set the pace."""
    running: bool
    state: TrainerState
    """The trainer's, which goes on with the training."""
    alert: RecallAlert
    results: dict[int, dict[str, ProbeResult]] = field(default_factory=dict)
    """By step, the probes of raw and restored weights: the last step's, and those of the best weights so far."""
    summary: dict[str, Any] = field(default_factory=dict)
    thinned: bool = False


class RecallMonitor:
    """Probes recall by schedule, in one `train()` or several, and compares it with the probe before the first step.

    ALL ranks must make one and call all its methods. `at_start` comes first in every `train()`.

    Args:
        config: the guard's settings.
        folder: the run folder, where the baseline and the answer formats are kept (`probe.json`).
        model: the unwrapped model.
        swap: opens a context in which the model has restored queries and keys; None where these are not probed.
        publish: takes (metrics, step, details).
        args, tokenizer, dataset: as the trainer has them.

    Attributes:
        prober: scores the samples; None where probes are off. Its `sample_keys` are those of the next probe.
        baseline: the probe before the first step of all; None if there was none.
        training: the state of this `train()`.
        costs: what probes of this `train()` cost, and how many samples it can afford.
    """

    def __init__(
        self,
        config: QKGuardConfig,
        folder: Path,
        model: nn.Module,
        swap: Swap | None,
        publish: Publish,
        args: TrainingArguments,
        tokenizer: Any,
        dataset: Any = None,
    ) -> None:
        self.config, self.folder, self.model, self.publish = config, folder, model, publish
        self.swap = swap if config.probe_restored else None
        self.baseline: ProbeResult | None = None
        self.training: _Training
        self.costs = ProbeCosts(config, model, dataset, restored=self.swap is not None)
        self._may_measure_baseline = True  # until the first train() begins to move the weights
        self._bars = not args.disable_tqdm
        self.prober: Prober | None = None
        lengths = list(config.probe_lengths or default_lengths(model, getattr(args, "max_length", None)))
        why = why_not(config, args, model, tokenizer, lengths)
        if why is None:
            make = partial(make_prober, config, model, tokenizer, lengths, dataset)
            self.prober = self._attempt("making the probe's samples", make)
        elif config.probe_steps != 0:
            _tell(logging.WARNING, "Recall probes are off: %s.", why)
        lost = None if config.probe_lengths else lengths_left_out(model, getattr(args, "max_length", None))
        if why is None and lost:
            _tell(logging.INFO, "Recall is probed at up to %d tokens: %s.", lengths[-1], lost)

    @property
    def summary(self) -> dict[str, Any]:
        """For manifests: the probe "before" SFT, and this training's last ones of the "raw" and "restored" weights."""
        if self.baseline is None:
            return self.training.summary
        asked = self.baseline.sample_keys if self.prober is None else self.prober.sample_keys
        return {"before": summary_of(self.baseline.only(asked))} | self.training.summary

    @property
    def at_floor(self) -> bool:
        """Whether the model before SFT finds so few needles that no loss can be seen; probing ends there."""
        return self.baseline is not None and at_floor(self.baseline.total.hits, self.baseline.total.count)

    @property
    def expected_seconds(self) -> float:
        """What the next probe will take, as far as is known."""
        return self.costs.seconds_of(self.prober.sample_keys) if self.prober is not None else 0.0

    def result_at(self, step: int, which: str) -> ProbeResult | None:
        """The probe of raw or restored weights (`RAW`, `RESTORED`) of this step of this training, if it is kept."""
        return self.training.results.get(step, {}).get(which)

    # -- events ------------------------------------------------------------------------------------------------------

    def at_start(self, args: TrainingArguments, state: TrainerState) -> None:
        """A `train()` begins: take a fresh schedule, budget and alarms, and see to the baseline.

        The baseline is measured before the first step of all. A resumed run takes it from its file: it is never
        measured on weights that have moved.
        """
        self._evaluates = IntervalStrategy(args.eval_strategy) != "no"
        every = interval(self.config.probe_steps, self._evaluates, state.max_steps)
        alert = RecallAlert(self.config, state.global_step / max(1, state.max_steps))
        self.training = _Training(every, self.prober is not None, state, alert)
        self.costs.begin(args, state)
        untrained, self._may_measure_baseline = self._may_measure_baseline and state.global_step == 0, False
        if self.prober is None:
            return
        if self.baseline is None and untrained:
            self._start_from_baseline()
        elif self.baseline is None:
            self._attempt("reading the probe's baseline", self._load_baseline)
        if self.baseline is not None:
            self.prober.sample_keys = self.baseline.sample_keys
        if self.baseline is not None and self.at_floor:
            self.training.running = False
            clause = floor_clause(self.baseline.total.hits, self.baseline.total.count, "Before training the model")
            _tell(
                logging.WARNING,
                "%s. Recall probes end here, without a verdict; restored checkpoints are written as asked.",
                clause,
            )
        elif self.baseline is not None:
            say_where_impossible(self.baseline)
        self.costs.start_clock()

    def _start_from_baseline(self) -> None:
        """Measure and report the baseline; ALL ranks must call this."""
        began = time.perf_counter()
        self.baseline = self._attempt("the probe before the first step", self._measure_baseline)
        if self.baseline is not None:
            reporting = time.perf_counter()
            self._report(self.baseline, 0, RAW, None)
            self.costs.measured(self.baseline.sample_keys, self.baseline.seconds + time.perf_counter() - reporting)
            self.training.results[0] = {RAW: self.baseline}
        self.costs.budget.first = time.perf_counter() - began

    def at_step(self, state: TrainerState, control: TrainerControl) -> None:
        """Raw weights, every so many steps."""
        if self.costs.max_steps != state.max_steps:  # a callback has changed it
            self.costs.max_steps = state.max_steps
            self.training.every = interval(self.config.probe_steps, self._evaluates, state.max_steps)
        if self.training.every and state.global_step % self.training.every == 0:
            self._scheduled(state, control)

    def at_evaluation(self, state: TrainerState, control: TrainerControl) -> None:
        """Raw weights, where evaluations set the pace."""
        if self.training.every is None:
            self._scheduled(state, control)

    def at_save(self, state: TrainerState, control: TrainerControl) -> None:
        """Raw and restored weights, before the restored checkpoint is written."""
        due = self._due(state.global_step)
        if self.swap is None or not due:
            return
        last = state.global_step >= state.max_steps  # these are the probes of `at_end`
        if self._makes_room(state, len(due), planned=True, last=last):
            for which in due:
                self._probe(state, control, which, planned=True, last=last)

    def at_end(self, step: int, control: TrainerControl) -> None:
        """Once more, whatever the budget says; raw and restored. `step` is the one that the weights are from."""
        training, state = self.training, self.training.state
        for which, result in training.results.get(step, {}).items():  # probed before, perhaps not last
            self._summarise(result, step, which)
            if max(training.results) > step:  # pages take the last row for that of the final weights
                earlier = self.baseline if which == RAW else self.result_at(step, RAW)
                self.publish(metrics_of(result, which), step, details_of(result, which, earlier, ()))
        due = self._due(step)
        if due and self._makes_room(state, len(due), planned=True, last=True):
            for which in due:
                self._probe(state, control, which, planned=True, last=True, step=step)
        if training.running:
            _tell(logging.INFO, "%s", self.costs.account(state.global_step))
        training.running = False  # an evaluation or a save after the end is no part of the training

    def _scheduled(self, state: TrainerState, control: TrainerControl) -> None:
        """Raw weights, where the budget allows it; those of the last step are `at_end`'s."""
        step = state.global_step
        on_the_way = self.costs.first_step < step < state.max_steps
        if on_the_way and RAW in self._due(step) and self._makes_room(state, 1):
            self._probe(state, control, RAW)

    def _due(self, step: int) -> list[str]:
        """Which weights have not been probed at this step; none where no probes are run."""
        both = [RAW] if self.swap is None else [RAW, RESTORED]
        return [which for which in both if self.training.running and self.result_at(step, which) is None]

    def _makes_room(self, state: TrainerState, passes: int, *, planned: bool = False, last: bool = False) -> bool:
        """Whether to probe now, and on how many samples from now on. ALL ranks must call this.

        Args:
            passes: how many probes are due.
            planned: whether they were planned at the start, as those at saves and at the end are.
            last: whether training has ended: these are run whatever the budget says.
        """
        assert self.prober is not None
        pool, step = self.prober.sample_keys, state.global_step
        decide = partial(self.costs.decide, pool, state, passes, planned=planned, last=last)
        room = ranks.on_rank_zero("budgeting a probe", decide)
        allowed = room.allowed or last
        if allowed and room.size is not None:
            self.prober.sample_keys = thin(pool, room.size)
            _tell(
                logging.INFO,
                "Probes ask %d of the %d samples from step %d on, to stay within probe_budget=%g; changes are "
                "measured on the samples that both probes have.",
                *(len(self.prober.sample_keys), len(pool), step, self.config.probe_budget),
            )
        if not allowed and not self.training.thinned:
            self.training.thinned = True
            _tell(logging.INFO, "%s", self.costs.why_left_out(pool, step))
        return allowed

    # -- one probe ---------------------------------------------------------------------------------------------------

    def _probe(
        self,
        state: TrainerState,
        control: TrainerControl,
        which: str,
        *,
        planned: bool = False,
        last: bool = False,
        step: int = -1,
    ) -> None:
        """Probe raw or restored weights, and act on the result; ALL ranks must call this.

        Args:
            planned: whether the budget has set time aside for it.
            last: whether training has ended.
            step: that the weights are from; -1 is this one.
        """
        began, step = time.perf_counter(), state.global_step if step < 0 else step
        what = f"the probe{' of the restored weights' if which == RESTORED else ''} at step {step}"

        def measure() -> tuple[ProbeResult, list[Fall]]:
            result = self._run(what, swap=self.swap if which == RESTORED else None)
            falls = self._falls(result, state, last) if which == RAW else []
            self._report(result, step, which, self.baseline if which == RAW else self.result_at(step, RAW), falls)
            return result, falls

        measured = self._attempt(what, measure)
        seconds = time.perf_counter() - began
        self.costs.spend(seconds, planned=planned)
        if measured is None:
            return
        result, falls = measured
        self.costs.measured(result.sample_keys, seconds)
        kept = {s: found for s, found in self.training.results.items() if s in (step, state.best_global_step)}
        self.training.results = kept | {step: kept.get(step, {}) | {which: result}}
        if which == RAW:
            self.training.alert.act(falls, step, control)

    def _run(self, what: str, *, swap: Swap | None = None) -> ProbeResult:
        """One pass over the samples, on ALL ranks; the weights are as before whatever happens."""
        assert self.prober is not None
        drawn = self._bars and ranks.rank() == 0
        try:
            with (
                swap() if swap is not None else nullcontext(),
                tqdm(desc=what, delay=BAR_AFTER, leave=False, disable=not drawn, file=sys.stderr) as bar,
            ):

                def progress(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                return AgreedProbe(what, self.prober, self.model).run(progress)
        finally:
            sharding.settle(self.model)

    def _measure_baseline(self) -> ProbeResult:
        """Probe the model before SFT and keep the result for resumed runs; ALL ranks must call this."""
        assert self.prober is not None
        self._find_formats()
        self.prober.questions = self.config.wants_retrieval_layers
        result = self._run("the probe before the first step")
        self.prober.questions = False
        data = {"state": self.prober.state(), "baseline": result.to_json()}
        ranks.on_rank_zero("keeping the probe's baseline", partial(write_json, self.folder / STATE, data))
        return result

    def _find_formats(self) -> None:
        """Find the answer formats, and plan by the time of a batch how many samples are asked. ALL ranks."""
        assert self.prober is not None
        what = "finding the answer formats"
        try:
            AgreedProbe(what, self.prober, self.model).find_formats()
        finally:
            sharding.settle(self.model)
        pool = self.prober.sample_keys
        make_plan = partial(self.costs.first_plan, pool, self.prober.timed_batch)
        plan = ranks.on_rank_zero("planning the probes", make_plan)
        if plan is not None:
            self.prober.sample_keys = thin(pool, plan.size)
            line = plan.tell(pool)
            if line:
                _tell(logging.INFO if plan.fits else logging.WARNING, "%s", line)

    def _load_baseline(self) -> None:
        """The baseline from its file, or the answer formats found anew without one; ALL ranks must call this."""
        assert self.prober is not None
        file = self.folder / STATE
        data = ranks.on_rank_zero("reading the probe's baseline", partial(read_json, file))
        if data is None:
            self._find_formats()
            _tell(
                logging.WARNING,
                "There is no %s from before training. Recall is probed, but there is nothing to compare it with, so "
                "no alert can follow.",
                file,
            )
            return
        baseline = ProbeResult.from_json(data["baseline"])
        if set(baseline.sample_keys) < set(self.prober.sample_keys):  # it was cut to the budget
            self.prober.sample_keys = baseline.sample_keys
        self.prober.load_state(data["state"])
        # files of earlier versions do not name the origin of their samples; the digest has just been compared
        same = baseline.settings | {"origin": self.prober.state()["origin"]}
        self.baseline = replace(baseline, settings=same)
        self.costs.measured(baseline.sample_keys, baseline.seconds)

    def _attempt(self, what: str, work: Callable[[], T]) -> T | None:
        with attempt(what, strict=self.config.strict, advice=ADVICE):
            return work()
        return None

    # -- what follows ------------------------------------------------------------------------------------------------

    def _falls(self, result: ProbeResult, state: TrainerState, last: bool) -> list[Fall]:
        """Where recall has fallen since the baseline; all ranks find the same."""
        if self.baseline is None:
            return []
        progress = state.global_step / max(1, state.max_steps)
        return self.training.alert.look(result, self.baseline, progress, last=last)

    def _report(
        self, result: ProbeResult, step: int, which: str, earlier: ProbeResult | None, falls: Sequence[Fall] = ()
    ) -> None:
        """To log, trackers and manifests; `earlier` is what recall is compared with, on the same samples."""
        _tell(logging.INFO, "%s", line_of(result, step, which))
        self.publish(metrics_of(result, which), step, details_of(result, which, earlier, falls))
        if step or which == RESTORED:
            self._summarise(result, step, which)

    def _summarise(self, result: ProbeResult, step: int, which: str) -> None:
        """For manifests, with the change that `_report` gave."""
        earlier = self.baseline if which == RAW else self.result_at(step, RAW)
        change = None if earlier is None else result.change_since(earlier)
        name = "raw" if which == RAW else "restored"
        self.training.summary[name] = summary_of(result) | {"step": step, "change": change}


def _tell(level: int, text: str, *values: Any) -> None:
    if ranks.rank() == 0:
        logger.log(level, text, *values)
