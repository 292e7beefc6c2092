"""Recall probes of one guarded training: when, on which samples, and what follows from a fall.

Every method is called on ALL ranks. Samples are divided over them; a failure on one rank becomes everybody's, except
inside a sharded forward pass, where the others wait in an all-gather: there the run ends.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import IntervalStrategy, TrainerControl, TrainerState, TrainingArguments

from qkguard.checkpoint.files import write_json
from qkguard.distributed import collectives, ranks, sharding
from qkguard.probe.lengths import check_lengths, default_lengths
from qkguard.probe.prober import Prober
from qkguard.probe.results import Drop, ProbeResult
from qkguard.training.attempt import attempt
from qkguard.training.config import QKGuardConfig
from qkguard.training.probe_schedule import Budget, interval
from qkguard.training.probe_setup import training_prose, why_not

logger = logging.getLogger(__name__)

STATE = "probe.json"
TIMEOUT = 1800.0  # seconds that ranks wait for one another in a probe
ADVICE = "change the probe_* settings or set probe_steps=0, and see `qkguard probe` for finished checkpoints"
T = TypeVar("T")
Swap = Callable[[], AbstractContextManager[None]]
Publish = Callable[[dict[str, float], int, dict[str, Any]], None]


class RecallMonitor:
    """Probes one training's recall by schedule and compares it with the probe before the first step.

    Args:
        config: the guard's settings.
        folder: the run folder, where the baseline and the answer forms are kept (`probe.json`).
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
        self.summary: dict[str, Any] = {}
        self.baseline: ProbeResult | None = None
        self._raw: ProbeResult | None = None  # the last one of the raw weights
        self._alarmed = self._thinned = self._running = False
        self._cost = 0.0  # seconds of one probe: a pass over the samples, and the trackers' pictures of it
        self._last_step = {False: -1, True: -1}  # of the raw and of the restored weights
        self.budget = Budget(config.probe_budget)
        lengths = list(config.probe_lengths or default_lengths(model, getattr(args, "max_length", None)))
        why = why_not(config, args, model, tokenizer, lengths)
        self.prober: Prober | None = None
        if why is None:
            self.prober = self._attempt("making the probe's samples", lambda: self._make(tokenizer, lengths, dataset))
        elif config.probe_steps != "0" and ranks.rank() == 0:
            logger.info("recall probes are off: %s", why)
        self.begin(state)

    def _make(self, tokenizer: Any, lengths: list[int], dataset: Any) -> Prober:
        config = self.config
        haystack: Any = config.haystack
        if haystack is None:  # rank 0's rows: data sets may differ from rank to rank, the samples must not
            haystack = ranks.on_rank_zero("reading the training text", lambda: training_prose(dataset, tokenizer))

        def make() -> Prober:
            warnings = check_lengths(self.model, lengths)
            if warnings and ranks.rank() == 0:
                logger.warning("%s", "; ".join(warnings))
            prober = Prober(
                tokenizer,
                lengths=lengths,
                depths=config.probe_depths,
                samples=config.probe_samples,
                tasks=config.probe_tasks,
                haystack=haystack,
            )
            prober.prepare(ranks.rank(), ranks.world_size())
            return prober

        made: list[Prober] = []
        ranks.agree("making the probe's samples", lambda: made.append(make()), timeout=TIMEOUT)
        return made[0]

    def begin(self, state: TrainerState) -> None:
        """A training begins or goes on: the clock of the budget starts."""
        self._began, self._began_at, self._max_steps = time.perf_counter(), state.global_step, state.max_steps
        self._running = self.prober is not None

    # -- events ------------------------------------------------------------------------------------------------------

    def at_start(self, state: TrainerState) -> None:
        """The baseline; in a resumed run from its file, never from weights that have moved."""
        if not self._running or self.baseline is not None:
            return
        if state.global_step > 0:
            self._attempt("reading the probe's baseline", self._load)
            return
        began = time.perf_counter()
        self.baseline = self._attempt("the probe before the first step", self._measure_baseline)
        if self.baseline is not None:
            reporting = time.perf_counter()
            self._report(self.baseline, 0, "", None)
            self._expect(self.baseline.seconds + time.perf_counter() - reporting)
            self._last_step[False] = 0
        self.budget.first = time.perf_counter() - began
        self.begin(state)

    def at_step(self, state: TrainerState, control: TrainerControl) -> None:
        if self.every and state.global_step % self.every == 0 and state.global_step < self._max_steps:
            self._scheduled(state, control)

    def at_evaluation(self, state: TrainerState, control: TrainerControl) -> None:
        if self.every is None and state.global_step < self._max_steps:
            self._scheduled(state, control)

    def at_save(self, state: TrainerState, control: TrainerControl) -> None:
        """Raw and restored weights, before the restored checkpoint is written."""
        if self.swap is not None:
            due = self._due_at(state.global_step)
            if self._running and (state.global_step >= self._max_steps or self._affords(state, len(due) * self._cost)):
                for swapped in due:
                    self._probe(state, control, swapped)

    def at_end(self, state: TrainerState, control: TrainerControl) -> None:
        """Once more, whatever the budget says; raw and restored."""
        if self._running:
            if self.reloads_best:  # these are not the weights of the last step
                self._last_step = {False: -1, True: -1}
            for swapped in self._due_at(state.global_step):
                self._probe(state, control, swapped)
        self._running = False

    def _due_at(self, step: int) -> list[bool]:
        """Which weights (raw, restored) have not been probed at this step."""
        both = [False] if self.swap is None else [False, True]
        return [swapped for swapped in both if self._last_step[swapped] != step]

    def _scheduled(self, state: TrainerState, control: TrainerControl) -> None:
        if self._running and self._last_step[False] != state.global_step and self._affords(state, self._cost):
            self._probe(state, control, swapped=False)

    # -- one probe ---------------------------------------------------------------------------------------------------

    def _probe(self, state: TrainerState, control: TrainerControl, swapped: bool) -> None:
        step, began = state.global_step, time.perf_counter()
        what = f"the probe{' of the restored weights' if swapped else ''} at step {step}"
        result = self._attempt(what, lambda: self._run(what, swapped))
        if result is not None:
            self._last_step[swapped] = step
            self._report(result, step, "_restored" if swapped else "", self._raw if swapped else self.baseline)
            if not swapped:
                self._raw = result
                if self.baseline is not None:
                    self._watch(result, step, control)
            self._cost = time.perf_counter() - began
        self.budget.spent += time.perf_counter() - began

    def _run(self, what: str, swapped: bool = False, forms: bool = False) -> ProbeResult:
        prober, rank, world = self._prober(), ranks.rank(), ranks.world_size()
        failed_together = False

        def agree(work: Callable[[], None] = lambda: None) -> None:
            nonlocal failed_together
            try:
                ranks.agree(what, work, timeout=TIMEOUT)
            except BaseException:
                failed_together = True
                raise

        def reduce(vector: Tensor) -> Tensor:
            agree()
            return collectives.all_reduce_sum(vector)

        swap = self.swap() if swapped and self.swap else nullcontext()
        try:
            with swap:
                try:
                    if forms:
                        prober.find_forms(self.model, rank=rank, world=world, all_reduce=reduce)
                    agree(lambda: prober.prepare(rank, world))  # in the forms now known, outside forward passes
                    return prober.run(self.model, rank=rank, world=world, all_reduce=reduce)
                except Exception as error:
                    if failed_together:
                        raise
                    ranks.agree(what, lambda error=error: _raise(error), timeout=TIMEOUT)  # type: ignore[misc]
                    raise
        finally:
            sharding.settle(self.model)

    def _prober(self) -> Prober:
        assert self.prober is not None
        return self.prober

    def _measure_baseline(self) -> ProbeResult:
        result = self._run("the probe before the first step", forms=True)
        data = {"state": self._prober().state(), "baseline": result.to_json()}
        ranks.on_rank_zero("keeping the probe's baseline", lambda: write_json(self.folder / STATE, data))
        return result

    def _load(self) -> None:
        def read() -> Any:
            path = self.folder / STATE
            return json.loads(path.read_text()) if path.exists() else None

        data = ranks.on_rank_zero("reading the probe's baseline", read)
        if data is None:
            self._expect(self._run("finding the answer forms", forms=True).seconds)
            if ranks.rank() == 0:
                logger.warning(
                    "the resumed run has no %s: recall is probed, but without a probe from before training there is "
                    "nothing to compare it with, and no alert",
                    self.folder / STATE,
                )
            return
        self._prober().load_state(data["state"])
        self.baseline = ProbeResult.from_json(data["baseline"])
        self._expect(self.baseline.seconds)

    def _expect(self, seconds: float) -> None:
        """What the next probe, and those at the end, will cost."""
        self._cost, self.budget.last = seconds, seconds * (1 if self.swap is None else 2)

    def _attempt(self, what: str, work: Callable[[], T]) -> T | None:
        return attempt(what, work, strict=self.config.strict, advice=ADVICE)

    def _affords(self, state: TrainerState, cost: float) -> bool:
        """Whether the budget allows a probe now, decided on rank 0 from its clock."""
        seconds = time.perf_counter() - self._began - self.budget.spent
        progress = (state.global_step - self._began_at) / max(1, self._max_steps - self._began_at)
        allowed = ranks.on_rank_zero("budgeting a probe", lambda: self.budget.allows(cost, seconds, progress))
        if not allowed and not self._thinned:
            self._thinned = True
            if ranks.rank() == 0:
                logger.info(
                    "probe_budget=%g leaves out the probe at step %d and others as needed: a probe "
                    "takes %.1f s, training so far took %.1f s, the probe before it %.1f s. Fewer probe_samples, "
                    "probe_depths or shorter probe_lengths make probes cheaper",
                    self.config.probe_budget,
                    state.global_step,
                    self._cost,
                    seconds,
                    self.budget.first,
                )
        return allowed

    # -- what follows ------------------------------------------------------------------------------------------------

    def _report(self, result: ProbeResult, step: int, suffix: str, earlier: ProbeResult | None) -> None:
        """To log, trackers and manifests; `earlier` is what recall is compared with, on the same samples."""
        metrics = metrics_of(result, suffix)
        low, high = result.total.interval
        if ranks.rank() == 0:
            lengths = ", ".join(f"{n}: {g.recall:.2f}" for (n,), g in result.by("length").items())
            logger.info(
                "recall%s at step %d: %.3f (95%% interval %.3f to %.3f; by length %s), %.1f s",
                " of the restored weights" if suffix else "",
                *(step, result.recall, low, high, lengths, result.seconds),
            )
        details: dict[str, Any] = {
            f"niah{suffix}_grid": [
                {"task": t, "length": n, "depth": d, "recall": g.recall, "count": g.count}
                for (t, n, d), g in result.by("task", "length", "depth").items()
            ]
        }
        if result.attention is not None:
            details[f"niah{suffix}_needle_mass"] = [
                {"length": n, "layers": list(result.attention.layers), "heads": grid}
                for n, grid in result.attention.needle.items()
            ]
        change = change_since(result, earlier) if earlier else None
        if change:
            details[f"niah{suffix}_change"] = change
        self.publish(metrics, step, details)
        summary = {k: v for k, v in result.to_json().items() if k not in ("samples", "attention", "generated")}
        if self.baseline is not None and "before" not in self.summary:
            self.summary["before"] = {k: v for k, v in self.baseline.to_json().items() if k in summary}
        if step or suffix:
            self.summary["restored" if suffix else "raw"] = summary | {"step": step, "change": change}

    def _watch(self, result: ProbeResult, step: int, control: TrainerControl) -> None:
        found = alarm(result, self.baseline, self.config.recall_alert) if self.baseline else None
        if found is None or self._alarmed:
            self._alarmed = found is not None
            return
        self._alarmed = True
        where, drop = found
        text = (
            f"recall{where} fell from {drop.before:.2f} to {drop.now:.2f} by step {step} (95% interval of the drop "
            f"{drop.low:.2f} to {drop.high:.2f}). The restored checkpoints keep the queries and keys from before"
        )
        if ranks.rank() == 0:
            logger.warning("%s", text)
            _wandb_alert(text)
        if self.config.on_alert == "save":
            control.should_save = True
        elif self.config.on_alert == "stop":
            control.should_training_stop = True


def alarm(now: ProbeResult, before: ProbeResult, threshold: float) -> tuple[str, Drop] | None:
    """The fall of recall to warn of, over all samples or at one length, and where; None where noise may explain it.

    A collapse at the longest contexts alone would drown in the mean, so every length is looked at too, at a level of
    significance divided by their number.
    """
    drop = now.drop_since(before)
    if drop.is_alarming(threshold):
        return "", drop
    lengths = sorted({c.length for c in now.cells})
    for length in reversed(lengths):
        drop = now.drop_since(before, length=length)
        if drop.is_alarming(threshold) and drop.p_value < 0.05 / len(lengths):
            return f" at {length} tokens", drop
    return None


def change_since(now: ProbeResult, earlier: ProbeResult) -> dict[str, float]:
    """The paired difference of recall with its 95% interval: positive where it rose."""
    drop = now.drop_since(earlier)
    return {"value": -drop.drop, "low": -drop.high, "high": -drop.low}


def metrics_of(result: ProbeResult, suffix: str = "") -> dict[str, float]:
    """Metric rows of one probe; `suffix` tells the restored weights' from the raw ones'."""
    name = f"qkguard/niah{suffix}"
    metrics = {f"{name}/recall": result.recall, f"{name}/answer_logprob": result.answer_logprob}
    metrics |= {f"{name}/{t}/{n}": g.recall for (t, n), g in result.by("task", "length").items()}
    if result.attention is not None:
        metrics |= {
            f"qkguard/attention{suffix}/{kind}_mass": result.attention.mean(kind) for kind in ("needle", "local")
        }
    return metrics | {f"qkguard/overhead/probe{suffix}_seconds": result.seconds}


def _raise(error: Exception) -> None:
    raise error


def _wandb_alert(text: str) -> None:
    """Tell the open W&B run, if there is one; never in the way of training."""
    import sys

    wandb = sys.modules.get("wandb")
    if wandb is None or getattr(wandb, "run", None) is None:
        return
    try:
        wandb.run.alert(title="qkguard: recall fell", text=text, level="WARN")
    except Exception as error:
        logger.error("wandb.alert failed (%s)", error)
