"""When to measure drift and to probe, and what the probes' budget allows: pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def is_due(schedule: int | Literal["logging"], step: int, logging_now: bool) -> bool:
    """Whether a drift schedule asks for a measurement at `step`."""
    if schedule == "logging":
        return logging_now
    return schedule > 0 and step % schedule == 0


def pace(schedule: int | Literal["logging"]) -> str:
    """A drift schedule in words."""
    return {"logging": "every logging step", 0: "never", 1: "every step"}.get(schedule, f"every {schedule} steps")


def interval(probe_steps: float | Literal["eval"], evaluates: bool, max_steps: int) -> int | None:
    """Steps between scheduled probes; None where evaluations set the pace."""
    if isinstance(probe_steps, int):
        return probe_steps
    if probe_steps == "eval" and evaluates:
        return None
    fraction = 0.1 if probe_steps == "eval" else probe_steps
    return max(1, round(fraction * max_steps))


@dataclass
class Budget:
    """Seconds spent on probes, against a share of training time.

    What the first and the last probe cost (`first`, `last`) is set aside; the rest of the share becomes free in step
    with training, so that probes left out are spread evenly over the run. A share of None sets no limit.
    """

    share: float | None
    first: float = 0.0
    last: float = 0.0
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
        return self.spent + cost <= (whole - self.first - self.last) * progress
