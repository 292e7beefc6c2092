"""When to measure drift and to probe, and what the probes' budget allows: pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState


def is_due(schedule: int | Literal["logging"], step: int, logging_now: bool) -> bool:
    """Whether a drift schedule asks for a measurement at `step`."""
    if schedule == "logging":
        return logging_now
    return schedule > 0 and step % schedule == 0


def step_comes_next(state: TrainerState, control: TrainerControl) -> bool:
    """Whether the trainer goes from a step's end to the next step, as far as it knows by then."""
    stops = control.should_save or control.should_evaluate or control.should_epoch_stop or control.should_training_stop
    return not stops and state.global_step < state.max_steps


def pace(schedule: int | Literal["logging"]) -> str:
    """A drift schedule in words."""
    return {"logging": "every logging step", 0: "never", 1: "every step"}.get(schedule, f"every {schedule} steps")


def probe_pace(probe_steps: float | Literal["eval"], evaluates: bool) -> str:
    """The schedule of probes in words, beside those before training, at saves and at its end."""
    if probe_steps == 0:
        return "never"
    if isinstance(probe_steps, int):
        return pace(probe_steps)
    if probe_steps == "eval" and evaluates:
        return "at every evaluation"
    return f"every {0.1 if probe_steps == 'eval' else probe_steps:.3g} of the training"


def interval(probe_steps: float | Literal["eval"], evaluates: bool, max_steps: int) -> int | None:
    """Steps between scheduled probes; None where evaluations set the pace."""
    if isinstance(probe_steps, int):
        return probe_steps
    if probe_steps == "eval" and evaluates:
        return None
    fraction = 0.1 if probe_steps == "eval" else probe_steps
    return max(1, round(fraction * max_steps))


def saves_between(args: Any, state: Any, first: int, last: int) -> int:
    """How many checkpoints Trainer will save after step `first` and before step `last`, as far as is known."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    every = float(state.save_steps or 0)
    if strategy == "epoch":
        every = state.max_steps / max(1, state.num_train_epochs)
    elif strategy == "best":  # at most with every evaluation
        every = float(state.eval_steps or 0)
    if strategy == "no" or every <= 0 or last <= first:
        return 0
    return max(0, math.ceil(last / every) - 1 - math.floor(first / every))


@dataclass
class Budget:
    """Seconds spent on probes, against a share of training time.

    What the `first` probe cost and what is `reserved` for planned ones is set aside; the rest of the share becomes
    free in step with training, so that probes left out are spread evenly over the run. `spent` is what unplanned ones
    have taken. A share of None sets no limit.
    """

    share: float | None
    first: float = 0.0
    reserved: float = 0.0
    spent: float = 0.0

    def allows(self, cost: float, training_seconds: float, progress: float) -> bool:
        """Whether a probe of `cost` seconds fits now, `training_seconds` without probes having brought the run to
        `progress` (0 to 1).
        """
        if progress <= 0:
            return False
        if self.share is None:
            return True
        whole = self.share * training_seconds / progress
        return self.spent + cost <= (whole - self.first - self.reserved) * progress
