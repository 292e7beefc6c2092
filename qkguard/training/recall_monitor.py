"""Recall probes of one guarded training: when, on which samples, and what follows from a fall.

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

from torch import Tensor, nn
from transformers import IntervalStrategy, TrainerControl, TrainerState, TrainingArguments

from qkguard.checkpoint.files import write_json
from qkguard.distributed import collectives, ranks, sharding
from qkguard.probe.prober import Prober
from qkguard.probe.results import ProbeResult, alarm
from qkguard.probe.settings import ProbeSettings, check_lengths, default_lengths
from qkguard.training.attempt import attempt
from qkguard.training.probe_schedule import Budget, interval
from qkguard.training.probe_setup import training_prose, why_not

if TYPE_CHECKING:  # pydantic doubles the time that `from qkguard import QKGuardCallback` takes
    from qkguard.training.config import QKGuardConfig

logger = logging.getLogger(__name__)

STATE = "probe.json"
TIMEOUT = 1800.0  # seconds; a rank posts no heartbeat while it scores, so this covers the passes between agreements
ADVICE = "Change the probe_* settings or set probe_steps=0; `qkguard probe` measures finished checkpoints."
T = TypeVar("T")
Swap = Callable[[], AbstractContextManager[None]]
Publish = Callable[[dict[str, float], int, dict[str, Any]], None]
RAW, RESTORED = "", "_restored"
"""Which weights a probe measured, as a suffix of its metrics' names."""


@dataclass
class _Training:
    """What begins anew with each training."""

    first_step: int
    max_steps: int
    budget: Budget
    began: float = field(default_factory=time.perf_counter)
    probed: dict[str, int] = field(default_factory=dict)  # last step at which raw and restored weights were probed
    last_raw: ProbeResult | None = None
    alarmed: bool = False
    thinned: bool = False

    def seconds(self) -> float:
        """Of training alone, without probes."""
        return time.perf_counter() - self.began - self.budget.spent

    def progress(self, step: int) -> float:
        return (step - self.first_step) / max(1, self.max_steps - self.first_step)


class RecallMonitor:
    """Probes one training's recall by schedule and compares it with the probe before the first step.

    Args:
        config: the guard's settings.
        folder: the run folder, where the baseline and the answer formats are kept (`probe.json`).
        model: the unwrapped model.
        swap: opens a context in which the model has restored queries and keys; None where these are not probed.
        publish: takes (metrics, step, details).
        args, state, tokenizer, dataset: as the trainer has them.
    """

    def __init__(
        self,
        config: QKGuardConfig,
        folder: Path,
        model: nn.Module,
        swap: Swap | None,
        publish: Publish,
        args: TrainingArguments,
        state: TrainerState,
        tokenizer: Any,
        dataset: Any = None,
    ) -> None:
        self.config, self.folder, self.model, self.publish = config, folder, model, publish
        self.swap = swap if config.probe_restored else None
        self.every = interval(config.probe_steps, IntervalStrategy(args.eval_strategy) != "no", state.max_steps)
        self.reloads_best = bool(args.load_best_model_at_end)
        self.baseline: ProbeResult | None = None
        self.summary: dict[str, Any] = {}
        self._cost = 0.0  # seconds of one probe: a pass over the samples, and the trackers' pictures of it
        self.prober: Prober | None = None
        lengths = list(config.probe_lengths or default_lengths(model, getattr(args, "max_length", None)))
        why = why_not(config, args, model, tokenizer, lengths)
        if why is None:
            self.prober = self._attempt("making the probe's samples", partial(self._make, tokenizer, lengths, dataset))
        elif config.probe_steps != 0:
            _tell(logging.INFO, "recall probes are off: %s", why)
        self.begin(state)

    def _make(self, tokenizer: Any, lengths: list[int], dataset: Any) -> Prober:
        config = self.config
        haystack: Any = config.haystack
        if haystack is None:  # rank 0's rows: data sets may differ from rank to rank, the samples must not
            haystack = ranks.on_rank_zero("reading the training text", partial(training_prose, dataset, tokenizer))
        settings = ProbeSettings(
            lengths, config.probe_depths, config.probe_samples, config.probe_tasks, haystack=haystack
        )
        made: list[Prober] = []

        def make() -> None:
            for warning in check_lengths(self.model, lengths):
                _tell(logging.WARNING, "%s", warning)
            prober = Prober(tokenizer, settings)
            prober.prepare(ranks.rank(), ranks.world_size())
            made.append(prober)  # not returned: `agree` would send it to every rank

        ranks.agree("making the probe's samples", make, timeout=TIMEOUT)
        return made[0]

    def begin(self, state: TrainerState) -> None:
        """A training begins or continues: the clock of the budget starts."""
        self.budget = Budget(self.config.probe_budget)
        self._training = _Training(state.global_step, state.max_steps, self.budget)
        self._running = self.prober is not None
        self._expect(self._cost)

    # -- events ------------------------------------------------------------------------------------------------------

    def at_start(self, state: TrainerState) -> None:
        """The baseline; in a resumed run from its file, never from weights that have moved."""
        if not self._running or self.baseline is not None:
            return
        if state.global_step > 0:
            self._attempt("reading the probe's baseline", self._load_baseline)
            return
        began = time.perf_counter()
        self.baseline = self._attempt("the probe before the first step", self._measure_baseline)
        if self.baseline is not None:
            reporting = time.perf_counter()
            self._report(self.baseline, 0, RAW, None)
            self._cost = self.baseline.seconds + time.perf_counter() - reporting
        self.begin(state)
        self.budget.first = time.perf_counter() - began
        if self.baseline is not None:
            self._training.probed[RAW] = 0

    def at_step(self, state: TrainerState, control: TrainerControl) -> None:
        if self.every and state.global_step % self.every == 0:
            self._scheduled(state, control)

    def at_evaluation(self, state: TrainerState, control: TrainerControl) -> None:
        if self.every is None:
            self._scheduled(state, control)

    def at_save(self, state: TrainerState, control: TrainerControl) -> None:
        """Raw and restored weights, before the restored checkpoint is written."""
        if self.swap is None or not self._running:
            return
        due = self._due(state.global_step)
        if state.global_step >= self._training.max_steps or self._affords(state, len(due) * self._cost):
            for which in due:
                self._probe(state, control, which)

    def at_end(self, state: TrainerState, control: TrainerControl) -> None:
        """Once more, whatever the budget says; raw and restored."""
        if self._running:
            if self.reloads_best:  # these are not the weights of the last step
                self._training.probed.clear()
            for which in self._due(state.global_step):
                self._probe(state, control, which)
        self._running = False

    def _scheduled(self, state: TrainerState, control: TrainerControl) -> None:
        """Raw weights, where the budget allows it; those of the last step are `at_end`'s."""
        step = state.global_step
        due = self._running and step < self._training.max_steps and RAW in self._due(step)
        if due and self._affords(state, self._cost):
            self._probe(state, control, RAW)

    def _due(self, step: int) -> list[str]:
        """Which weights have not been probed at this step."""
        both = [RAW] if self.swap is None else [RAW, RESTORED]
        return [which for which in both if self._training.probed.get(which) != step]

    def _affords(self, state: TrainerState, cost: float) -> bool:
        """Whether the budget allows a probe now, decided on rank 0 from its clock. ALL ranks must call this."""
        training, step = self._training, state.global_step
        seconds = training.seconds()
        decide = partial(self.budget.allows, cost, seconds, training.progress(step))
        allowed = ranks.on_rank_zero("budgeting a probe", decide)
        if not allowed and not training.thinned:
            training.thinned = True
            _tell(
                logging.INFO,
                "probe_budget=%g leaves out the probe at step %d, and others as needed: a probe takes %.1f s; "
                "training so far took %.1f s, the probe before it %.1f s. Fewer probe_samples or probe_depths, or "
                "shorter probe_lengths, make probes cheaper",
                *(self.config.probe_budget, step, self._cost, seconds, self.budget.first),
            )
        return allowed

    def _expect(self, seconds: float) -> None:
        """What the next probe, and those at the end, will cost."""
        self._cost, self.budget.last = seconds, seconds * (1 if self.swap is None else 2)

    # -- one probe ---------------------------------------------------------------------------------------------------

    def _probe(self, state: TrainerState, control: TrainerControl, which: str) -> None:
        training, step, began = self._training, state.global_step, time.perf_counter()
        what = f"the probe{' of the restored weights' if which == RESTORED else ''} at step {step}"
        result = self._attempt(what, partial(self._run, what, swap=self.swap if which == RESTORED else None))
        if result is not None:
            training.probed[which] = step
            self._report(result, step, which, self.baseline if which == RAW else training.last_raw)
            if which == RAW:
                training.last_raw = result
                self._watch(result, step, control)
            self._cost = time.perf_counter() - began
        self.budget.spent += time.perf_counter() - began

    def _run(self, what: str, *, swap: Swap | None = None, find_formats: bool = False) -> ProbeResult:
        assert self.prober is not None
        try:
            with swap() if swap is not None else nullcontext():
                return _AgreedProbe(what, self.prober, self.model).run(find_formats)
        finally:
            sharding.settle(self.model)

    def _measure_baseline(self) -> ProbeResult:
        assert self.prober is not None
        result = self._run("the probe before the first step", find_formats=True)
        data = {"state": self.prober.state(), "baseline": result.to_json()}
        ranks.on_rank_zero("keeping the probe's baseline", partial(write_json, self.folder / STATE, data))
        return result

    def _load_baseline(self) -> None:
        assert self.prober is not None
        file = self.folder / STATE
        data = ranks.on_rank_zero("reading the probe's baseline", partial(_read_json, file))
        if data is None:
            self._expect(self._run("finding the answer formats", find_formats=True).seconds)
            _tell(
                logging.WARNING,
                "the resumed run has no %s: recall is probed, but without a probe from before training there is "
                "nothing to compare it with, and no alert",
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
            "recall%s at step %d: %.3f (95%% interval %.3f to %.3f; by length %s), %.1f s",
            " of the restored weights" if which == RESTORED else "",
            *(step, result.recall, low, high, lengths, result.seconds),
        )
        change = result.change_since(earlier) if earlier else None
        self.publish(metrics_of(result, which), step, _details(result, which, change))
        if self.baseline is not None and "before" not in self.summary:
            self.summary["before"] = _summary(self.baseline)
        if step or which == RESTORED:
            name = "raw" if which == RAW else "restored"
            self.summary[name] = _summary(result) | {"step": step, "change": change}

    def _watch(self, result: ProbeResult, step: int, control: TrainerControl) -> None:
        """Warn once of a fall of recall, and save or stop where `on_alert` says so."""
        if self.baseline is None:
            return
        found = alarm(result, self.baseline, self.config.recall_alert)
        was_alarmed, self._training.alarmed = self._training.alarmed, found is not None
        if found is None or was_alarmed:
            return
        where, drop = found
        text = (
            f"recall{where} fell from {drop.before:.2f} to {drop.now:.2f} by step {step} (95% interval of the drop "
            f"{drop.low:.2f} to {drop.high:.2f}). The restored checkpoints keep the queries and keys from before"
        )
        _tell(logging.WARNING, "%s", text)
        _wandb_alert(text)
        if self.config.on_alert == "save":
            control.should_save = True
        elif self.config.on_alert == "stop":
            control.should_training_stop = True


class _AgreedProbe:
    """One probe on ALL ranks: a failure outside forward passes on one of them is raised on all.

    `ranks.agree` before every all-reduce lets a rank that failed meet the others there, instead of leaving them in
    the collective until its timeout. A rank whose failure the others have not heard of yet tells them.
    """

    def __init__(self, what: str, prober: Prober, model: nn.Module) -> None:
        self.what, self.prober, self.model = what, prober, model
        self.rank, self.world = ranks.rank(), ranks.world_size()
        self.failed_together = False

    def run(self, find_formats: bool) -> ProbeResult:
        where: dict[str, Any] = {"rank": self.rank, "world": self.world, "all_reduce": self._all_reduce}
        try:
            if find_formats:
                self.prober.find_formats(self.model, **where)
            # In the formats now known; making samples can fail on one rank alone, so it stays outside forward passes
            self._agree(partial(self.prober.prepare, self.rank, self.world))
            return self.prober.run(self.model, **where)
        except Exception as error:
            if not self.failed_together:
                self._agree(partial(_raise, error))
            raise

    def _all_reduce(self, vector: Tensor) -> Tensor:
        """ALL ranks must call this."""
        self._agree(_nothing)
        return collectives.all_reduce_sum(vector)

    def _agree(self, work: Callable[[], None]) -> None:
        """ALL ranks must call this."""
        try:
            ranks.agree(self.what, work, timeout=TIMEOUT)
        except BaseException:
            self.failed_together = True
            raise


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


def _nothing() -> None:
    pass


def _raise(error: Exception) -> None:
    raise error


def _wandb_alert(text: str) -> None:
    """Tell the open W&B run, if there is one; never in the way of training."""
    wandb = sys.modules.get("wandb")
    if ranks.rank() != 0 or wandb is None or getattr(wandb, "run", None) is None:
        return
    try:
        wandb.run.alert(title="qkguard: recall fell", text=text, level="WARN")
    except Exception as error:
        logger.error("wandb.alert failed (%s)", error)
