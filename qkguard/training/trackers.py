"""The trackers a run may report to, beside Trainer's own callbacks: the runs these opened are used, never replaced."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

STEP = "train/global_step"
COLUMNS: list[str | int] = ["step", "weights", "task", "length", "depth", "recall", "samples"]


class Tracker:
    """One tracker; `visual` ones also get pictures (name -> PNG bytes) and the table of all probes."""

    visual = False

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        raise NotImplementedError

    def show(self, pictures: Mapping[str, bytes], table: Sequence[Sequence[Any]], step: int) -> None:
        """Pictures and rows (`COLUMNS`) as of now."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Final numbers of the run."""


class WandB(Tracker):
    """Rows in the run that Trainer's own callback opened; it defines the step metric, ours are bound to it."""

    visual = True

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._defined: str | None = None  # the run whose metrics are defined: a script may open another one

    def _run(self) -> Any:
        import wandb

        run = wandb.run
        if run is not None and self._defined != run.id:
            run.define_metric("qkguard/*", step_metric=STEP, step_sync=True)
            run.config.update({"qkguard": self.settings}, allow_val_change=True)
            self._defined = run.id
        return run

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        if run := self._run():
            run.log({**metrics, STEP: step})

    def show(self, pictures: Mapping[str, bytes], table: Sequence[Sequence[Any]], step: int) -> None:
        if run := self._run():
            import wandb

            images = {f"qkguard/pictures/{name}": wandb.Image(_opened(data)) for name, data in pictures.items()}
            rows = wandb.Table(columns=COLUMNS, data=[list(row) for row in table])
            run.log({**images, "qkguard/probes": rows, STEP: step})

    def summary(self, values: Mapping[str, float]) -> None:
        if run := self._run():
            run.summary.update({f"qkguard/final/{name}": value for name, value in values.items()})


class TensorBoard(Tracker):
    """A second event file beside the one of Trainer's callback, so that both show as one run."""

    visual = True

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._writer: Any = None

    @property
    def writer(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=str(self._folder()), filename_suffix=".qkguard")
        return self._writer

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def show(self, pictures: Mapping[str, bytes], table: Sequence[Sequence[Any]], step: int) -> None:
        import numpy

        for name, data in pictures.items():
            self.writer.add_image(f"qkguard/pictures/{name}", numpy.asarray(_opened(data)), step, dataformats="HWC")
        self.writer.flush()

    def _folder(self) -> Path:
        if named := os.environ.get("TENSORBOARD_LOGGING_DIR"):
            return Path(named).expanduser()
        runs = self.output_dir / "runs"
        events = sorted(runs.glob("*/events.out.tfevents.*"), key=lambda p: p.stat().st_mtime)
        return events[-1].parent if events else runs / "qkguard"


class Trackio(Tracker):
    """Scalars in the run that Trainer's own callback opened, until that callback ends it with training."""

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        import trackio
        from trackio import context_vars

        if context_vars.current_run.get() is not None:
            trackio.log({**metrics, STEP: step})


class MLflow(Tracker):
    """Scalars in the run that Trainer's own callback opened, also after that callback has ended it."""

    def __init__(self) -> None:
        self._run: str | None = None

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        import mlflow

        if run := mlflow.active_run():
            self._run = run.info.run_id
        if self._run:
            client = mlflow.MlflowClient()
            for key, value in metrics.items():  # "/" is allowed in its names
                client.log_metric(self._run, key, value, step=step)


def _opened(png: bytes) -> Any:
    from PIL import Image  # comes with matplotlib

    return Image.open(BytesIO(png)).convert("RGB")
