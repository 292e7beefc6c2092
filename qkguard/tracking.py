"""Metrics to whatever the run reports to, beside Trainer's own rows and never through them (rank 0 only)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

STEP = "train/global_step"


class Tracking:
    """Publishes rows of metrics to `metrics.jsonl` and to the trackers named in `report_to`.

    `trainer.log` is not used: TRL renames its keys and loses that step's loss row. W&B rows carry the step as the
    metric Trainer's own callback defines, never `step=`, with which a second writer loses data.
    """

    def __init__(self, folder: Path, report_to: list[str], output_dir: Path, resumed_at: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            if resumed_at:  # rows after the step a run resumes from belong to a branch that was left
                rows = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= resumed_at]
                self.path.write_text("".join(f"{line}\n" for line in rows))
            else:
                earlier = (folder / f"metrics-{n}.jsonl" for n in count(1))
                self.path.rename(next(path for path in earlier if not path.exists()))
        self._sinks: list[Callable[[dict[str, float], int], None]] = []
        if "wandb" in report_to:
            self._sinks.append(_WandB())
        if "tensorboard" in report_to:
            self._sinks.append(_TensorBoard(output_dir))

    def log(self, metrics: Mapping[str, float], step: int, details: Mapping[str, Any] | None = None) -> None:
        """One row: scalars to every tracker, `details` (lists, tables) to `metrics.jsonl` alone."""
        scalars = {k: float(v) for k, v in metrics.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **scalars, **(details or {})}) + "\n")
        for sink in self._sinks:
            sink(scalars, step)


class _WandB:
    """Rows in the run that Trainer's own callback opened; it defines the step metric, ours are bound to it."""

    def __init__(self) -> None:
        self._defined: str | None = None  # the run whose metrics are defined: a script may open another one

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        import wandb

        if wandb.run is None:
            return
        if self._defined != wandb.run.id:
            wandb.run.define_metric("qkguard/*", step_metric=STEP, step_sync=True)
            self._defined = wandb.run.id
        wandb.log({**metrics, STEP: step})


class _TensorBoard:
    """A second event file beside the one of Trainer's callback, so that both show as one run."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.writer: Any = None

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(log_dir=str(self._folder()), filename_suffix=".qkguard")
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def _folder(self) -> Path:
        if named := os.environ.get("TENSORBOARD_LOGGING_DIR"):
            return Path(named).expanduser()
        runs = self.output_dir / "runs"
        events = sorted(runs.glob("*/events.out.tfevents.*"), key=lambda p: p.stat().st_mtime)
        return events[-1].parent if events else runs / "qkguard"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, oldest first; `folder` is the run's `_qkguard` folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
