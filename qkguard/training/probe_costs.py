"""What the probes of a `train()` cost and what it can afford; by rank 0's clock, so rank 0 alone decides."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerState, TrainingArguments

from qkguard.distributed import ranks
from qkguard.probe.samples import SampleKey
from qkguard.probe.thinning import Size, size_of
from qkguard.training.probe_plan import MARGIN, Plan, hidden_size, make_plan, row_length, work, work_of, work_of_step
from qkguard.training.schedules import Budget, saves_between

if TYPE_CHECKING:  # pydantic doubles the time that `from qkguard import QKGuardCallback` takes
    from qkguard.training.config import QKGuardConfig


@dataclass(frozen=True)
class Room:
    """Whether a probe is run now, and the size that later ones are cut to; None leaves it as it is."""

    allowed: bool
    size: Size | None = None


class ProbeCosts:
    """Plans, pays and reports the probes of one `train()` after another; `begin` comes first in each.

    Those at saves and at the end are planned: time is set aside for them, and fewer samples are asked until they fit.
    Scheduled ones share what is left, evenly over the run.

    Attributes:
        budget: what this `train()` may spend, and has spent.
        first_step, max_steps: of this `train()`.
        extra_at_end: passes over the same samples that others run when training ends, to be planned for as well.
    """

    def __init__(self, config: QKGuardConfig, model: nn.Module, dataset: Any, *, restored: bool) -> None:
        self.share = config.probe_budget
        self.extra_at_end = 0
        self.budget = Budget(self.share)
        self.max_steps = 0
        self._dataset, self._hidden = dataset, hidden_size(model)
        self._both = 2 if restored else 1  # passes over raw, and over restored weights
        self._probes_saves = restored and config.restore_on in ("save", "best")
        self._rate = 0.0  # seconds of a unit of work, as last measured; 0 where nothing has been
        self._step_seconds = 0.0  # of a step in an earlier train(); 0 without one

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """A `train()` begins, with a fresh budget and clock."""
        self._args, self._state = args, state
        self.first_step, self.max_steps = state.global_step, state.max_steps
        self.budget = Budget(self.share)
        self._entered = time.perf_counter()
        self._spent = self._spent_as_planned = 0.0
        self._fits = True
        self.start_clock()

    def start_clock(self) -> None:
        """What comes before the first step is done."""
        self._began = time.perf_counter()

    def training_seconds(self) -> float:
        """Of this `train()` so far, without probes."""
        return time.perf_counter() - self._began - self._spent

    # -- what a probe takes ------------------------------------------------------------------------------------------

    def seconds_of(self, keys: Sequence[SampleKey]) -> float:
        """What a pass over these samples takes, as far as has been measured."""
        return self._rate * self._work_of(keys)

    def measured(self, keys: Sequence[SampleKey], seconds: float) -> None:
        """A pass over these samples took so long."""
        self._rate = seconds / self._work_of(keys)

    def spend(self, seconds: float, *, planned: bool) -> None:
        """A probe has run; a failed one costs as well."""
        self._spent += seconds
        if planned and self._fits:
            self._spent_as_planned += seconds
        else:
            self.budget.spent += seconds

    def _work_of(self, keys: Sequence[SampleKey]) -> float:
        return work_of(keys, self._hidden, ranks.world_size())

    # -- what is asked -----------------------------------------------------------------------------------------------

    def first_plan(self, pool: Sequence[SampleKey], timed_batch: tuple[int, float] | None) -> Plan | None:
        """How many samples all planned probes can ask, from the time of one batch; None without a budget.

        The length of the training is not known yet: it is estimated from its arithmetic, and corrected when steps have
        been timed (`decide`).
        """
        if self.share is None or timed_batch is None:
            return None
        length, seconds = timed_batch
        self._rate = seconds / work(length, self._hidden)
        step = self._step_seconds
        if not step:
            row = row_length(self._dataset, self._args)
            step = self._rate * work_of_step(self._args, row, self._hidden)
        training = step * (self.max_steps - self.first_step)
        waited = time.perf_counter() - self._entered
        plan = make_plan(
            pool,
            self.seconds_of,
            passes=1 + self._planned_after(self.first_step, self._state),
            at_least=1 + self._at_end,
            training=training,
            share=self.share,
            spent=waited + (1 - 1 / MARGIN) * self.share * training,
        )
        self._fits = plan.fits
        return plan

    def decide(
        self, pool: Sequence[SampleKey], state: TrainerState, passes: int, *, planned: bool, last: bool
    ) -> Room:
        """Whether so many probes are run now, and on how many samples from now on: by the time that steps have taken.

        The samples only ever get fewer, so that later probes can be compared with earlier ones. `last`: training has
        ended.
        """
        step = state.global_step
        progress = (step - self.first_step) / max(1, self.max_steps - self.first_step)
        if self.share is None:
            return Room(progress > 0)
        if progress <= 0:
            return Room(False)
        seconds = self.training_seconds()
        whole = seconds / progress
        now = passes if planned else 0
        left = now + (self.extra_at_end if last else self._planned_after(step, state))
        plan = make_plan(
            pool,
            self.seconds_of,
            passes=left,
            at_least=self._at_end,
            training=whole,
            share=self.share,
            spent=self.budget.first + self._spent,
        )
        self._fits = plan.fits
        self.budget.reserved = self._spent_as_planned + plan.seconds * (left if plan.fits else self._at_end)
        allowed = (planned and plan.fits) or self.budget.allows(passes * plan.seconds, seconds, progress)
        return Room(allowed, None if plan.size == size_of(pool) else plan.size)

    @property
    def _at_end(self) -> int:
        return self._both + self.extra_at_end

    def _planned_after(self, step: int, state: TrainerState) -> int:
        """Passes at saves after `step`, and at the end."""
        saves = saves_between(self._args, state, step, self.max_steps) if self._probes_saves else 0
        return saves * self._both + self._at_end

    # -- what is said ------------------------------------------------------------------------------------------------

    def why_left_out(self, keys: Sequence[SampleKey], step: int) -> str:
        return (
            f"probe_budget={self.share:g} leaves out the probe at step {step}, and later ones as needed: a probe "
            f"takes {self.seconds_of(keys):.1f} s, training has taken {self.training_seconds():.1f} s so "
            f"far, and the first probe took {self.budget.first:.1f} s. For cheaper probes, lower probe_samples, "
            "probe_depths or probe_lengths."
        )

    def account(self, step: int) -> str:
        """What the probes of this `train()` took; it has ended at `step`."""
        training, probes = self.training_seconds(), self.budget.first + self._spent
        self._step_seconds = training / max(1, step - self.first_step)
        budget = "no probe_budget" if self.share is None else f"probe_budget={self.share:g}"
        return (
            f"Recall probes took {probes:.1f} s, {probes / (training + probes):.0%} of this training's "
            f"{training + probes:.1f} s ({budget})."
        )
