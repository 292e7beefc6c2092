"""Metrics to `metrics.jsonl` and to whatever the run reports to, beside Trainer's own rows (rank 0 only)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from qkguard.checkpoint.manifest import finite
from qkguard.report.run import METRICS, read_rows
from qkguard.training.charts import tracker_name
from qkguard.training.resume import drop_later_rows
from qkguard.training.trackers import Tracker, open_trackers


class MetricsLog:
    """Publishes rows of metrics to `metrics.jsonl` and to the trackers named in `report_to`.

    `trainer.log` is not used: TRL renames its keys and loses that step's loss row.

    Args:
        folder: the run folder.
        report_to: of the training arguments; wandb, tensorboard, trackio and mlflow are served.
        output_dir: the trainer's.
        resumed_at: the step that a resumed run continues from; 0 for a new one.
        settings: the guard's settings, recorded in W&B's config.
        trackers: the user's own, besides.
    """

    def __init__(
        self,
        folder: Path,
        report_to: Sequence[str],
        output_dir: Path,
        resumed_at: int = 0,
        settings: Mapping[str, Any] | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.folder, self.path = folder, folder / METRICS
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and resumed_at:
            drop_later_rows(self.path, resumed_at)
        elif self.path.exists():
            earlier = (folder / f"metrics-{n}.jsonl" for n in count(1))
            self.path.rename(next(path for path in earlier if not path.exists()))
        self.trackers = [*open_trackers(report_to, output_dir, settings or {}), *trackers]
        self._last_step = resumed_at
        self._sent: tuple[int, set[str]] = (-1, set())  # a step, and the metrics that trackers have of it

    def log(self, metrics: Mapping[str, float], step: int, details: Mapping[str, Any] | None = None) -> None:
        """One row: scalars to every tracker; `details` (lists, tables) to `metrics.jsonl` alone.

        Trackers get a metric once for a step: what is measured again when training ends is in `metrics.jsonl` alone.
        After a probe and the verdict, those that show pictures and tables get them anew.
        """
        scalars = {key: float(value) for key, value in metrics.items()}
        fresh = self._not_sent(scalars, step)
        self._append(json.dumps(finite({"step": step, **scalars, **(details or {})}), allow_nan=False))
        if not fresh:
            return
        named = {tracker_name(key): value for key, value in fresh.items()}
        for tracker in self.trackers:
            tracker.scalars(named, step)
        has_pictures = any(key.endswith("_grid") or key == "verdict" for key in details or {})
        if has_pictures and any(tracker.visual for tracker in self.trackers):
            self._show(step)

    def _not_sent(self, scalars: Mapping[str, float], step: int) -> dict[str, float]:
        """Those that trackers do not have for this step. Steps mostly grow; for an earlier one the file is read."""
        if step != self._sent[0]:
            known: set[str] = set()
            if step <= self._last_step and self.path.exists():
                known = {key for row in read_rows(self.path) if row["step"] == step for key in row}
            self._sent, self._last_step = (step, known), max(step, self._last_step)
        fresh = {key: value for key, value in scalars.items() if key not in self._sent[1]}
        self._sent[1].update(fresh)
        return fresh

    def _append(self, row: str) -> None:
        """Add a line, first ending one that a killed process has left torn."""
        with open(self.path, "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end > 0:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    row = "\n" + row
            file.write(f"{row}\n".encode())

    def _show(self, step: int) -> None:
        from qkguard.report.figures import run_figures  # matplotlib
        from qkguard.report.page import themed_png
        from qkguard.report.run import load_run

        run = load_run(self.folder)
        pictures = {name: themed_png(figure, dpi=100) for name, figure in run_figures(run).items()}
        for tracker in self.trackers:
            if tracker.visual:
                tracker.show(run, pictures, step)

    def summarise(self, values: Mapping[str, float | str]) -> None:
        """Final numbers to the trackers' summaries."""
        for tracker in self.trackers:
            tracker.summary(values)

    def write_page(self) -> Path:
        """Write the run's page as of now and return its path."""
        from qkguard.report.run_page import write_report

        return write_report(self.folder)
