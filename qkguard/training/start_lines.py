"""Lines of the log at the start of a run, as far as full weights and adapters share them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import IntervalStrategy, TrainingArguments

from qkguard.layout.selection import show_layers
from qkguard.report.numbers import plural
from qkguard.report.run import METRICS
from qkguard.training.run_folder import FINAL
from qkguard.training.schedules import pace, probe_pace

if TYPE_CHECKING:
    from qkguard.training.config import QKGuardConfig


def schedule_line(config: QKGuardConfig, args: TrainingArguments, *, drifts: bool, restores: bool) -> str:
    """When drift and recall are measured and restored models written; `drifts` and `restores`: whether they can be."""
    parts = (
        [f"drift {pace(config.drift_steps)}", f"routing drift {pace(config.routing_drift_steps)}"] if drifts else []
    )
    parts.append(f"recall {probe_pace(config.probe_steps, IntervalStrategy(args.eval_strategy) != 'no')}")
    if restores:
        parts.append(f"restored models ({_method(config)}) {_saves(config)}")
    return f"Schedule: {', '.join(parts)}."


def files_line(config: QKGuardConfig, args: TrainingArguments, folder: Path, place: str | None, merges: str) -> str:
    """Where restored models (`place` in a checkpoint), final models and metrics go; `merges`: what else is written."""
    parts = []
    if place is not None and config.restore_on in ("save", "best"):
        parts.append(f"checkpoint-N/{place}")
    if place is not None and _exports(config):
        parts.append(f"{shown(folder / FINAL)} when training ends")
    metrics = ", ".join([str(shown(folder / METRICS)), *(args.report_to or [])])
    return f"Files: {'; '.join([*parts, *([merges] if merges else []), f'metrics in {metrics}'])}."


def _exports(config: QKGuardConfig) -> bool:
    return config.final_export and config.restore_on != "never"


def _method(config: QKGuardConfig) -> str:
    return "restore, at the end by verdict" if config.method == "auto" else config.method


def _saves(config: QKGuardConfig) -> str:
    when = {"save": "at every save", "best": "at every best save"}.get(config.restore_on)
    return " and ".join([*([when] if when else []), *(["at the end"] if _exports(config) else [])]) or "never"


def shown(path: Path) -> Path:
    """A path as it reads best: from the working directory where it is below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def layers_of(layers: Iterable[int | None], total: int | None) -> str:
    """ "2 softmax-attention layers (1, 3) of 4"."""
    layers = list(layers)
    of_total = f" of {total}" if total else ""
    return f"{plural(len(layers), 'softmax-attention layer')} ({show_layers(layers)}){of_total}"
