"""When to probe, at which lengths, and what the budget allows: pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHORT = (512, 1024, 2048)
"""Lengths that are cheap and where recall moves first."""


def default_lengths(model_config: Any, max_length: int | None) -> list[int]:
    """512, 1024, 2048 and 2 and 4 times the training length, as far as the model's positions go."""
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    room = getattr(text, "max_position_embeddings", None)
    lengths = {*SHORT, *(factor * max_length for factor in (2, 4) if max_length)}
    return sorted(n for n in lengths if not room or n <= room)


def interval(probe_steps: str, evaluates: bool, max_steps: int) -> int | None:
    """Steps between scheduled probes; None where evaluations set the pace."""
    if probe_steps.isdigit():
        return int(probe_steps)
    if probe_steps == "eval":
        if evaluates:
            return None
        probe_steps = "0.1"
    return max(1, round(float(probe_steps) * max_steps))


@dataclass
class Budget:
    """Seconds spent on probes, against a share of training time.

    What the first and the last probe cost (`first`, `last`) is set aside; the rest of the share becomes free in step
    with training, so that probes left out are spread evenly over the run.
    """

    share: float
    first: float = 0.0
    last: float = 0.0
    spent: float = 0.0

    def allows(self, cost: float, training_seconds: float, progress: float) -> bool:
        """Whether a probe of `cost` seconds fits now, `training_seconds` without probes having brought the run to
        `progress` (0 to 1).
        """
        if progress <= 0:
            return False
        whole = self.share * training_seconds / progress
        return self.spent + cost <= (whole - self.first - self.last) * progress
