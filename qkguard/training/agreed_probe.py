"""One probe, or one pass over task rows, on all ranks: it fails on all of them or on none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from qkguard.choice.task import TaskResult, TaskRow, score_rows
from qkguard.distributed import collectives, ranks
from qkguard.probe.prober import Prober
from qkguard.probe.results import ProbeResult
from qkguard.probe.settings import Progress

T = TypeVar("T")
TIMEOUT = 1800.0  # seconds; a rank posts no heartbeat while it scores, so this covers the passes between agreements


class AgreedProbe:
    """What is measured of a model on ALL ranks: a failure outside forward passes on one of them is raised on all.

    `ranks.agree` before every all-reduce lets a rank that failed meet the others there, instead of leaving them in
    the collective until its timeout. A rank whose failure the others have not heard of yet tells them.
    """

    def __init__(self, what: str, prober: Prober, model: nn.Module) -> None:
        self.what, self.prober, self.model = what, prober, model
        self.rank, self.world = ranks.rank(), ranks.world_size()
        self.where: dict[str, Any] = {"rank": self.rank, "world": self.world, "all_reduce": self._all_reduce}
        self.failed_together = False

    def find_formats(self) -> None:
        """Find the answer formats, on samples that are made already; ALL ranks must call this."""
        self._together(partial(self.prober.find_formats, self.model, **self.where))

    def run(self, progress: Progress | None = None) -> ProbeResult:
        """Score this rank's samples, and sum over the ranks; ALL ranks must call this."""
        return self._together(partial(self._probe, progress))

    def score(self, rows: Sequence[TaskRow]) -> TaskResult:
        """The loss of rows, the same ones on every rank, each scoring its share; ALL ranks must call this."""
        return self._together(partial(score_rows, self.model, rows, **self.where))

    def _probe(self, progress: Progress | None) -> ProbeResult:
        # Making samples can fail on one rank alone, so it stays outside forward passes
        self._agree(partial(self.prober.prepare, self.rank, self.world))
        return self.prober.run(self.model, progress=progress, **self.where)

    def _together(self, work: Callable[[], T]) -> T:
        """ALL ranks must call this."""
        try:
            return work()
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


def _nothing() -> None:
    pass


def _raise(error: Exception) -> None:
    raise error
