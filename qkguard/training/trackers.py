"""The trackers a run may report to. They write into the runs that Trainer's own callbacks opened, and open none."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from qkguard.report.run import Run
from qkguard.training.charts import LINES, PICTURES, UNCHARTED, line_charts, verdict_bars

STEP = "train/global_step"
COLUMNS: list[str | int] = ["step", "weights", "task", "length", "depth", "recall", "samples"]


class Tracker:
    """One tracker, on rank 0. Your own goes to the callback, `QKGuardCallback(trackers=[Mine()])`."""

    visual = False
    """Whether it shows pictures and tables."""

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        """One row of metrics."""
        raise NotImplementedError

    def show(self, run: Run, pictures: Mapping[str, bytes], step: int) -> None:
        """The run as of now: charts of several lines, a table of all probes, and its pictures (name -> PNG bytes)."""

    def summary(self, values: Mapping[str, float | str]) -> None:
        """Final numbers of the run, and the verdict in words."""


class WandB(Tracker):
    """Rows in the run that Trainer's own callback opened.

    They carry the step as the metric `train/global_step`, which that callback defines. With `wandb.log(step=...)` W&B
    would drop rows: it takes no step that another writer has already passed.
    """

    visual = True

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self._defined: str | None = None  # the id of the run whose metrics are defined: a script may open another

    def _run(self) -> Any:
        import wandb

        run = wandb.run
        if run is not None and self._defined != run.id:
            run.define_metric("qkguard*", step_metric=STEP, step_sync=True)
            for name in UNCHARTED:
                run.define_metric(name, step_metric=STEP, step_sync=True, hidden=True)
            run.config.update({"qkguard": self.settings}, allow_val_change=True)
            self._defined = run.id
        return run

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        run = self._run()
        if run is not None:
            run.log({**metrics, STEP: step})

    def show(self, run: Run, pictures: Mapping[str, bytes], step: int) -> None:
        page = self._run()
        if page is None:
            return
        import wandb

        shown: dict[str, Any] = {f"{PICTURES}/{name}": wandb.Image(_opened(png)) for name, png in pictures.items()}
        shown[f"{PICTURES}/probes"] = wandb.Table(columns=COLUMNS, data=probe_table(run))
        for name, chart in line_charts(run).items():
            steps, values = ([[point[i] for point in line] for line in chart.lines.values()] for i in (0, 1))
            shown[f"qkguard/{name}"] = wandb.plot.line_series(
                steps, values, keys=list(chart.lines), title=chart.title, xname="step", split_table=True
            )
        if (verdict := verdict_bars(run)) is not None:
            title, bars = verdict
            rows = wandb.Table(columns=["model", "recall"], data=[list(bar) for bar in bars])
            shown["qkguard/verdict"] = wandb.plot.bar(rows, "model", "recall", title=title, split_table=True)
        page.log({**shown, STEP: step})

    def summary(self, values: Mapping[str, float | str]) -> None:
        run = self._run()
        if run is not None:
            run.summary.update({f"qkguard/final/{name}": value for name, value in values.items()})


class TensorBoard(Tracker):
    """A second event file beside the one of Trainer's callback: TensorBoard shows both as one run."""

    visual = True

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    @cached_property
    def writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(log_dir=str(self._folder()), filename_suffix=".qkguard")
        writer.add_custom_scalars(
            {"qkguard": {name: ["Multiline", list(lines.values())] for name, lines in LINES.items()}}
        )
        return writer

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def show(self, run: Run, pictures: Mapping[str, bytes], step: int) -> None:
        import numpy

        for name, png in pictures.items():
            self.writer.add_image(f"{PICTURES}/{name}", numpy.asarray(_opened(png)), step, dataformats="HWC")
        self.writer.flush()

    def _folder(self) -> Path:
        """Where Trainer's callback writes: $TENSORBOARD_LOGGING_DIR, else the newest folder in `runs`."""
        named = os.environ.get("TENSORBOARD_LOGGING_DIR")
        if named:
            return Path(named).expanduser()
        runs = self.output_dir / "runs"
        events = sorted(runs.glob("*/events.out.tfevents.*"), key=os.path.getmtime)
        return events[-1].parent if events else runs / "qkguard"


class Trackio(Tracker):
    """Scalars in the run that Trainer's own callback opened; that callback ends it when training ends."""

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        import trackio
        from trackio import context_vars

        if context_vars.current_run.get() is not None:  # `trackio.log` raises without a run
            trackio.log({**metrics, STEP: step})


class MLflow(Tracker):
    """Scalars in the run that Trainer's own callback opened, also after that callback has ended it."""

    def __init__(self) -> None:
        self._run: str | None = None  # the id of the run that was last open

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        import mlflow

        run = mlflow.active_run()
        if run is not None:
            self._run = run.info.run_id
        if self._run is not None:
            client = mlflow.MlflowClient()
            for key, value in metrics.items():
                client.log_metric(self._run, key, value, step=step)


def open_trackers(report_to: Sequence[str], output_dir: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers that a run reports to; names that are not served are left to Trainer's own callbacks."""
    trackers: list[Tracker] = []
    if "wandb" in report_to:
        trackers.append(WandB(settings))
    if "tensorboard" in report_to:
        trackers.append(TensorBoard(output_dir))
    if "trackio" in report_to:
        trackers.append(Trackio())
    if "mlflow" in report_to:
        trackers.append(MLflow())
    return trackers


def probe_table(run: Run) -> list[list[Any]]:
    """All probes of a run: rows of `COLUMNS`."""
    return [
        [probe.step, probe.weights, *(cell[key] for key in ("task", "length", "depth", "recall", "count"))]
        for probe in run.probes
        for cell in probe.groups
    ]


def _opened(png: bytes) -> Any:
    from PIL import Image  # comes with matplotlib

    return Image.open(BytesIO(png)).convert("RGB")
