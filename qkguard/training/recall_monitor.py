"""Recall probes of a guarded training: when, on which samples, and what follows from a fall.

ALL ranks must call every method. Samples are divided over them; a failure on one rank becomes everybody's, except
inside a sharded forward pass, where the others wait in an all-gather: there the run ends.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from transformers import IntervalStrategy, TrainerControl, TrainerState, TrainingArguments

from qkguard.checkpoint.files import write_json
from qkguard.distributed import ranks, sharding
from qkguard.probe.prober import Prober
from qkguard.probe.results import ProbeResult, alarm
from qkguard.probe.settings import ProbeSettings, check_lengths, default_lengths, lengths_left_out
from qkguard.training.agreed_probe import TIMEOUT, AgreedProbe
from qkguard.training.attempt import attempt
from qkguard.training.probe_setup import training_prose, why_not
from qkguard.training.schedules import Budget, interval

if TYPE_CHECKING:  # pydantic doubles the time that `from qkguard import QKGuardCallback` takes
    from qkguard.training.config import QKGuardConfig

logger = logging.getLogger(__name__)

STATE = "probe.json"
ADVICE = "Change the probe_* settings or set probe_steps=0; `qkguard probe` measures finished checkpoints."
T = TypeVar("T")
Swap = Callable[[], AbstractContextManager[None]]
Publish = Callable[[dict[str, float], int, dict[str, Any]], None]
RAW, RESTORED = "", "_restored"
"""Which weights a probe measured, as a suffix of its metrics' names."""


@dataclass
class _Training:
    """What begins anew with each `train()`: its schedule and budget, what it has probed, and what it has told."""

    first_step: int
    max_steps: int
    every: int | None
    """Steps between scheduled probes; None where evaluations set the pace."""
    budget: Budget
    running: bool
    began: float = field(default_factory=time.perf_counter)
    probed: dict[str, int] = field(default_factory=dict)
    """The last step at which raw and restored weights were probed."""
    last_raw: ProbeResult | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    alarmed: bool = False
    thinned: bool = False

    def seconds(self) -> float:
        """Of training alone, without probes."""
        return time.perf_counter() - self.began - self.budget.spent

    def progress(self, step: int) -> float:
        """From 0 at this training's first step to 1 at its last."""
        return (step - self.first_step) / max(1, self.max_steps - self.first_step)


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
        prober: scores the samples; None where probes are off.
        baseline: the probe before the first step of all; None if there was none.
        training: the state of this `train()`.
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
        self._may_measure_baseline = True  # until the first train() begins to move the weights
        self._cost = 0.0  # seconds of one probe: a pass over the samples, and the trackers' pictures of it
        self.prober: Prober | None = None
        lengths = list(config.probe_lengths or default_lengths(model, getattr(args, "max_length", None)))
        why = why_not(config, args, model, tokenizer, lengths)
        if why is None:
            self.prober = self._attempt("making the probe's samples", partial(self._make, tokenizer, lengths, dataset))
        elif config.probe_steps != 0:
            _tell(logging.WARNING, "Recall probes are off: %s.", why)
        lost = None if config.probe_lengths else lengths_left_out(model, getattr(args, "max_length", None))
        if why is None and lost:
            _tell(logging.INFO, "Recall is probed at up to %d tokens: %s.", lengths[-1], lost)

    def _make(self, tokenizer: Any, lengths: list[int], dataset: Any) -> Prober:
        """A prober with its samples made; ALL ranks must call this."""
        config = self.config
        haystack: Any = config.haystack
        if haystack is None:  # rank 0's rows: data sets may differ from rank to rank, the samples must not
            haystack = ranks.on_rank_zero("reading the training text", partial(training_prose, dataset, tokenizer))
        settings = ProbeSettings(
            lengths, config.probe_depths, config.probe_samples, config.probe_tasks, haystack=haystack
        )

        def make() -> Prober:
            for warning in check_lengths(self.model, lengths):
                _tell(logging.WARNING, "%s", warning)
            prober = Prober(tokenizer, settings)
            prober.prepare(ranks.rank(), ranks.world_size())
            return prober

        return ranks.agree("making the probe's samples", make, timeout=TIMEOUT)

    @property
    def summary(self) -> dict[str, Any]:
        """For manifests: the probe "before" SFT, and this training's last ones of the "raw" and "restored" weights."""
        before = {} if self.baseline is None else {"before": _summary(self.baseline)}
        return before | self.training.summary

    # -- events ------------------------------------------------------------------------------------------------------

    def at_start(self, args: TrainingArguments, state: TrainerState) -> None:
        """A `train()` begins: take a fresh schedule, budget and alarms, and see to the baseline.

        The baseline is measured before the first step of all. A resumed run takes it from its file: it is never
        measured on weights that have moved.
        """
        evaluates = IntervalStrategy(args.eval_strategy) != "no"
        self.training = _Training(
            state.global_step,
            state.max_steps,
            interval(self.config.probe_steps, evaluates, state.max_steps),
            Budget(self.config.probe_budget),
            running=self.prober is not None,
        )
        self._expect(self._cost)
        untrained, self._may_measure_baseline = self._may_measure_baseline and state.global_step == 0, False
        if self.prober is None or self.baseline is not None:
            return
        if untrained:
            self._start_from_baseline()
        else:
            self._attempt("reading the probe's baseline", self._load_baseline)
        self.training.began = time.perf_counter()

    def _start_from_baseline(self) -> None:
        """Measure and report the baseline, and set its cost aside; ALL ranks must call this."""
        began = time.perf_counter()
        self.baseline = self._attempt("the probe before the first step", self._measure_baseline)
        if self.baseline is not None:
            reporting = time.perf_counter()
            self._report(self.baseline, 0, RAW, None)
            self._expect(self.baseline.seconds + time.perf_counter() - reporting)
            self.training.probed[RAW] = 0
        self.training.budget.first = time.perf_counter() - began

    def at_step(self, state: TrainerState, control: TrainerControl) -> None:
        """Raw weights, every so many steps."""
        if self.training.every and state.global_step % self.training.every == 0:
            self._scheduled(state, control)

    def at_evaluation(self, state: TrainerState, control: TrainerControl) -> None:
        """Raw weights, where evaluations set the pace."""
        if self.training.every is None:
            self._scheduled(state, control)

    def at_save(self, state: TrainerState, control: TrainerControl) -> None:
        """Raw and restored weights, before the restored checkpoint is written."""
        if self.swap is None or not self.training.running:
            return
        due = self._due(state.global_step)
        if state.global_step >= self.training.max_steps or self._affords(state, len(due) * self._cost):
            for which in due:
                self._probe(state.global_step, control, which)

    def at_end(self, step: int, control: TrainerControl) -> None:
        """Once more, whatever the budget says; raw and restored. `step` is the one that the weights are from."""
        training = self.training
        if training.running:
            for which in self._due(step):
                self._probe(step, control, which)
        training.running = False  # an evaluation or a save after the end is no part of the training

    def _scheduled(self, state: TrainerState, control: TrainerControl) -> None:
        """Raw weights, where the budget allows it; those of the last step are `at_end`'s."""
        step = state.global_step
        due = self.training.running and step < self.training.max_steps and RAW in self._due(step)
        if due and self._affords(state, self._cost):
            self._probe(step, control, RAW)

    def _due(self, step: int) -> list[str]:
        """Which weights have not been probed at this step."""
        both = [RAW] if self.swap is None else [RAW, RESTORED]
        return [which for which in both if self.training.probed.get(which) != step]

    def _affords(self, state: TrainerState, cost: float) -> bool:
        """Whether the budget allows a probe now, decided on rank 0 from its clock. ALL ranks must call this."""
        training, step = self.training, state.global_step
        seconds = training.seconds()
        decide = partial(training.budget.allows, cost, seconds, training.progress(step))
        allowed = ranks.on_rank_zero("budgeting a probe", decide)
        if not allowed and not training.thinned:
            training.thinned = True
            _tell(
                logging.INFO,
                "probe_budget=%g leaves out the probe at step %d, and later ones as needed: a probe takes %.1f s, "
                "training has taken %.1f s so far, and the first probe took %.1f s. For cheaper probes, lower "
                "probe_samples, probe_depths or probe_lengths.",
                *(self.config.probe_budget, step, self._cost, seconds, training.budget.first),
            )
        return allowed

    def _expect(self, seconds: float) -> None:
        """What the next probe, and those at the end, will cost."""
        self._cost, self.training.budget.last = seconds, seconds * (1 if self.swap is None else 2)

    # -- one probe ---------------------------------------------------------------------------------------------------

    def _probe(self, step: int, control: TrainerControl, which: str) -> None:
        """Probe raw or restored weights, and act on the result; ALL ranks must call this."""
        training, began = self.training, time.perf_counter()
        what = f"the probe{' of the restored weights' if which == RESTORED else ''} at step {step}"
        result = self._attempt(what, partial(self._run, what, swap=self.swap if which == RESTORED else None))
        if result is not None:
            training.probed[which] = step
            self._report(result, step, which, self.baseline if which == RAW else training.last_raw)
            if which == RAW:
                training.last_raw = result
                self._watch(result, step, control)
            self._cost = time.perf_counter() - began
        training.budget.spent += time.perf_counter() - began

    def _run(self, what: str, *, swap: Swap | None = None, find_formats: bool = False) -> ProbeResult:
        """One pass over the samples, on ALL ranks; the weights are as before whatever happens."""
        assert self.prober is not None
        try:
            with swap() if swap is not None else nullcontext():
                return AgreedProbe(what, self.prober, self.model).run(find_formats)
        finally:
            sharding.settle(self.model)

    def _measure_baseline(self) -> ProbeResult:
        """Probe the model before SFT and keep the result for resumed runs; ALL ranks must call this."""
        assert self.prober is not None
        result = self._run("the probe before the first step", find_formats=True)
        data = {"state": self.prober.state(), "baseline": result.to_json()}
        ranks.on_rank_zero("keeping the probe's baseline", partial(write_json, self.folder / STATE, data))
        return result

    def _load_baseline(self) -> None:
        """The baseline from its file, or the answer formats found anew without one; ALL ranks must call this."""
        assert self.prober is not None
        file = self.folder / STATE
        data = ranks.on_rank_zero("reading the probe's baseline", partial(_read_json, file))
        if data is None:
            self._expect(self._run("finding the answer formats", find_formats=True).seconds)
            _tell(
                logging.WARNING,
                "There is no %s from before training. Recall is probed, but there is nothing to compare it with, so "
                "no alert can follow.",
                file,
            )
            return
        self.prober.load_state(data["state"])
        self.baseline = ProbeResult.from_json(data["baseline"])
        self._expect(self.baseline.seconds)

    def _attempt(self, what: str, work: Callable[[], T]) -> T | None:
        with attempt(what, strict=self.config.strict, advice=ADVICE):
            return work()
        return None

    # -- what follows ------------------------------------------------------------------------------------------------

    def _report(self, result: ProbeResult, step: int, which: str, earlier: ProbeResult | None) -> None:
        """To log, trackers and manifests; `earlier` is what recall is compared with, on the same samples."""
        low, high = result.total.interval
        lengths = ", ".join(f"{n}: {group.recall:.2f}" for (n,), group in result.by("length").items())
        _tell(
            logging.INFO,
            "Recall%s at step %d: %.3f (95%% interval %.3f to %.3f; by length %s), in %.1f s.",
            " of the restored weights" if which == RESTORED else "",
            *(step, result.recall, low, high, lengths, result.seconds),
        )
        change = result.change_since(earlier) if earlier else None
        self.publish(metrics_of(result, which), step, _details(result, which, change))
        if step or which == RESTORED:
            name = "raw" if which == RAW else "restored"
            self.training.summary[name] = _summary(result) | {"step": step, "change": change}

    def _watch(self, result: ProbeResult, step: int, control: TrainerControl) -> None:
        """Warn once of a fall of recall, and save or stop where `on_alert` says so."""
        if self.baseline is None:
            return
        found = alarm(result, self.baseline, self.config.recall_alert)
        was_alarmed, self.training.alarmed = self.training.alarmed, found is not None
        if found is None or was_alarmed:
            return
        where, drop = found
        text = (
            f"Recall{where} fell from {drop.before:.2f} to {drop.now:.2f} by step {step} (95% interval of the drop: "
            f"{drop.low:.2f} to {drop.high:.2f}). Restored checkpoints keep the queries and keys from before SFT."
        )
        _tell(logging.WARNING, "%s", text)
        _wandb_alert(text)
        if self.config.on_alert == "save":
            control.should_save = True
        elif self.config.on_alert == "stop":
            control.should_training_stop = True


def metrics_of(result: ProbeResult, suffix: str = RAW) -> dict[str, float]:
    """Metric rows of one probe; `suffix` tells the restored weights' from the raw ones'."""
    name = f"qkguard/niah{suffix}"
    metrics = {f"{name}/recall": result.recall, f"{name}/answer_logprob": result.answer_logprob}
    metrics |= {f"{name}/{task}/{n}": group.recall for (task, n), group in result.by("task", "length").items()}
    if result.attention is not None:
        for kind in ("needle", "local"):
            metrics[f"qkguard/attention{suffix}/{kind}_mass"] = result.attention.mean(kind)
    return metrics | {f"qkguard/overhead/probe{suffix}_seconds": result.seconds}


def _details(result: ProbeResult, suffix: str, change: dict[str, float] | None) -> dict[str, Any]:
    """What `metrics.jsonl` and the page hold beside the metrics."""
    details: dict[str, Any] = {
        f"niah{suffix}_grid": [
            {"task": task, "length": n, "depth": depth, "recall": group.recall, "count": group.count}
            for (task, n, depth), group in result.by("task", "length", "depth").items()
        ]
    }
    if result.attention is not None:
        layers = list(result.attention.layers)
        details[f"niah{suffix}_needle_mass"] = [
            {"length": n, "layers": layers, "heads": grid} for n, grid in result.attention.needle.items()
        ]
    if change is not None:
        details[f"niah{suffix}_change"] = change
    return details


def _summary(result: ProbeResult) -> dict[str, Any]:
    """What a manifest keeps of a probe."""
    return {k: v for k, v in result.to_json().items() if k not in ("samples", "attention", "generated")}


def _tell(level: int, text: str, *values: Any) -> None:
    if ranks.rank() == 0:
        logger.log(level, text, *values)


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None


def _wandb_alert(text: str) -> None:
    """Tell the open W&B run, if there is one; never in the way of training."""
    wandb = sys.modules.get("wandb")
    if ranks.rank() != 0 or wandb is None or getattr(wandb, "run", None) is None:
        return
    try:
        wandb.run.alert(title="qkguard: recall fell", text=text, level="WARN")
    except Exception as error:
        logger.error("The alert was not sent to W&B (%s).", error)
