"""What a training sets aside when it begins: an earlier one's models, a branch that was left (one process)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from qkguard.checkpoint.manifest import finite
from qkguard.report.run import read_rows
from qkguard.training.run_folder import FINAL, RESTORED

SUPERSEDED = "superseded"
TRAINER_STATE = "trainer_state.json"  # transformers.trainer has the name too, but importing that takes a second


def set_aside_restored(output_dir: Path, folder: Path, step: int) -> list[Path]:
    """Move what an earlier training left into the run folder: its final models, and the restored folders of
    checkpoints later than `step`. Raw checkpoints stay where they are. Returns the new places.
    """
    moved = []
    for restored in sorted(output_dir.glob(f"checkpoint-*/{RESTORED}")):
        number = restored.parent.name.removeprefix("checkpoint-")
        if number.isdigit() and int(number) > step:
            moved.append(set_aside(restored, folder, restored.parent.name))
    if (folder / FINAL).is_dir():
        moved.append(set_aside(folder / FINAL, folder, FINAL))
    return moved


def set_aside(made: Path, folder: Path, name: str) -> Path:
    """Move a folder of the guard's to `superseded/name` in the run folder; returns its new place.

    The times of the folder around it stay as they are: Trainer's rotation goes by those of checkpoints.
    """
    target = folder / SUPERSEDED / name
    target.parent.mkdir(parents=True, exist_ok=True)
    while target.exists():
        target = target.with_name(target.name + "-older")
    before = made.parent.stat()
    shutil.move(made, target)  # the run folder may be on another file system
    os.utime(made.parent, ns=(before.st_atime_ns, before.st_mtime_ns))
    return target


def saved_folder(output_dir: Path, step: int) -> Path:
    """The checkpoint folder that a save of this step has just written.

    Hyperparameter search saves in `run-N/checkpoint-M`; of several the one whose state was written last.
    """
    name = f"checkpoint-{step}"
    states = [output_dir / name / TRAINER_STATE, *output_dir.glob(f"run-*/{name}/{TRAINER_STATE}")]
    written = [state for state in states if state.is_file()]
    return max(written, key=os.path.getmtime).parent if written else output_dir / name


def drop_later_rows(metrics: Path, step: int) -> None:
    """Remove the rows of steps later than `step` from a metrics file."""
    rows = [row for row in read_rows(metrics) if row["step"] <= step]
    fresh = metrics.with_suffix(".part")
    fresh.write_text("".join(f"{json.dumps(finite(row), allow_nan=False)}\n" for row in rows))
    fresh.replace(metrics)
