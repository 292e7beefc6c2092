"""When the drift of one `train()` is measured, and what was found last."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from qkguard.distributed import ranks
from qkguard.training.attempt import attempt
from qkguard.training.drift_monitor import DriftMonitor, Started

if TYPE_CHECKING:  # imports PEFT
    from qkguard.adapters.drift import AdapterDriftMonitor

logger = logging.getLogger(__name__)

ADVICE = "drift_steps=0 trains without measuring it."


@dataclass
class _UnderWay:
    """A measurement that the training runs beside: of which step, and this rank's part of it, None where it failed."""

    step: int
    deferred: ranks.Deferred
    sums: Started | None
    seconds: float


class DriftLog:
    """Measures drift and publishes it; ALL ranks must call its methods.

    Args:
        monitor: measures; None where nothing can drift.
        model: the live model.
        publish: of the session: one row of metrics, its step, and details.
        check: raises what this rank owes the others.

    Attributes:
        last: the last metrics of this `train()`, with the "step" they were measured at ("routing_step" for routing
            drift).
    """

    def __init__(
        self,
        monitor: DriftMonitor | AdapterDriftMonitor | None,
        model: nn.Module,
        publish: Callable[[dict[str, float], int, dict[str, Any] | None], None],
        check: Callable[[], None],
        *,
        strict: bool,
    ) -> None:
        self.monitor, self.model, self.publish, self.check, self.strict = monitor, model, publish, check, strict
        self.last: dict[str, float] = {}
        self._under_way: _UnderWay | None = None
        if isinstance(monitor, DriftMonitor):
            monitor.side.listen()

    def measure(self, step: int, *, drift: bool, routing: bool, beside: bool = False) -> None:
        """Measure what is asked for and publish it. `step`: that of the live weights.

        With `beside`, which says that a training step comes next, an accelerator works out drift during that step, and
        it is published at the next call of `settle`.
        """
        self.settle()
        if self.monitor is None or not (drift or routing):
            return
        started, deferred = time.perf_counter(), ranks.Deferred("measuring drift")
        deferred.run(self.check)
        if beside and not routing and isinstance(self.monitor, DriftMonitor) and self.monitor.side.goes_beside:
            sums = deferred.run(partial(self.monitor.start, self.model))
            self._under_way = _UnderWay(step, deferred, sums, time.perf_counter() - started)
            return
        with self._attempt(step):
            metrics, heads = self.monitor.measure(self.model, deferred, drift=drift, routing=routing)
            at = ({"step": step} if drift else {}) | ({"routing_step": step} if routing else {})
            details = {"routing_rel_per_head": heads} if routing else None
            self._publish(metrics, step, at, time.perf_counter() - started, details)

    def settle(self) -> None:
        """Publish what is under way, if anything is: at the next of the trainer's events."""
        if self._under_way is None:
            return
        begun, self._under_way = self._under_way, None
        assert isinstance(self.monitor, DriftMonitor)
        started = time.perf_counter()
        with self._attempt(begun.step):
            metrics = self.monitor.finish(begun.sums, begun.deferred)
            seconds = begun.seconds + time.perf_counter() - started
            self._publish(metrics, begun.step, {"step": begun.step}, seconds)

    def close(self) -> None:
        """The training is over."""
        try:
            self.settle()
        finally:
            if isinstance(self.monitor, DriftMonitor):
                self.monitor.side.close()

    def _attempt(self, step: int) -> AbstractContextManager[None]:
        return attempt(f"measuring drift at step {step}", strict=self.strict, advice=ADVICE)

    def _publish(
        self,
        metrics: dict[str, float],
        step: int,
        at: dict[str, int],
        seconds: float,
        details: dict[str, Any] | None = None,
    ) -> None:
        if any(value != value for value in metrics.values()) and ranks.rank() == 0:
            logger.warning("Drift is not a number at step %d: the queries or keys hold NaN or Inf.", step)
        self.last |= metrics | at
        metrics["qkguard/overhead/drift_seconds"] = seconds
        self.publish(metrics, step, details)
