"""Metrics to whatever the run reports to, beside Trainer's own rows and never through them (rank 0 only)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from qkguard.report.run import METRICS, read_rows
from qkguard.training.trackers import MLflow, TensorBoard, Tracker, Trackio, WandB

logger = logging.getLogger(__name__)


class MetricsLog:
    """Publishes rows of metrics to `metrics.jsonl` and to the trackers named in `report_to`.

    `trainer.log` is not used: TRL renames its keys and loses that step's loss row. W&B rows carry the step as the
    metric Trainer's own callback defines, never `step=`, with which a second writer loses data.

    Args:
        folder: the run folder.
        report_to: of the training arguments; wandb, tensorboard, trackio and mlflow are served.
        output_dir: the trainer's.
        resumed_at: the step a resumed run goes on from; 0 for a new one.
        settings: the guard's settings, recorded in W&B's config.
    """

    def __init__(
        self,
        folder: Path,
        report_to: list[str],
        output_dir: Path,
        resumed_at: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.path = folder, folder / METRICS
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            if resumed_at:  # rows after the step a run resumes from belong to a branch that was left
                rows = [row for row in read_rows(self.path) if row["step"] <= resumed_at]
                fresh = self.path.with_suffix(".part")
                fresh.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
                fresh.replace(self.path)
            else:
                earlier = (folder / f"metrics-{n}.jsonl" for n in count(1))
                self.path.rename(next(path for path in earlier if not path.exists()))
        makers: dict[str, Callable[[], Tracker]] = {
            "wandb": lambda: WandB(dict(settings or {})),
            "tensorboard": lambda: TensorBoard(output_dir),
            "trackio": Trackio,
            "mlflow": MLflow,
        }
        self.trackers: list[Tracker] = [make() for name, make in makers.items() if name in report_to]

    def log(self, metrics: Mapping[str, float], step: int, details: Mapping[str, Any] | None = None) -> None:
        """One row: scalars to every tracker, `details` (lists, tables) to `metrics.jsonl` alone.

        With a probe's details, trackers that show pictures and tables get them anew.
        """
        scalars = {k: float(v) for k, v in metrics.items()}
        with open(self.path, "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            torn = end > 0 and (file.seek(end - 1), file.read(1))[1] != b"\n"
            row = json.dumps({"step": step, **scalars, **(details or {})})
            file.write((("\n" if torn else "") + row + "\n").encode())
        for tracker in self.trackers:
            tracker.scalars(scalars, step)
        if any(key.endswith("_grid") for key in details or {}) and any(tracker.visual for tracker in self.trackers):
            self._show(step)

    def _show(self, step: int) -> None:
        from qkguard.report.figures import run_figures
        from qkguard.report.page import themed_png
        from qkguard.report.run import load_run

        run = load_run(self.folder)
        pictures = {name: themed_png(figure, dpi=100) for name, figure in run_figures(run).items()}
        table = [
            [p.step, p.weights, c["task"], c["length"], c["depth"], c["recall"], c["count"]]
            for p in run.probes
            for c in p.groups
        ]
        for tracker in self.trackers:
            if tracker.visual:
                tracker.show(pictures, table, step)

    def summarise(self, values: Mapping[str, float]) -> None:
        """Final numbers to the trackers' summaries."""
        for tracker in self.trackers:
            tracker.summary(values)

    def write_page(self) -> Path:
        """The page of the run as it is now; returns its path."""
        from qkguard.report.run_page import write_report

        return write_report(self.folder)
