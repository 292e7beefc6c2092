"""A training's output folder: what its beginning sets aside or removes; which folder a save wrote (one process)."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from qkguard.checkpoint.manifest import finite
from qkguard.checkpoint.staging import remove_abandoned
from qkguard.checkpoint.weights import TEMPORARY
from qkguard.report.run import read_rows
from qkguard.training.run_folder import FINAL, RESTORED

if TYPE_CHECKING:
    from transformers import TrainerState

logger = logging.getLogger(__name__)

SUPERSEDED = "superseded"
TRAINER_STATE = "trainer_state.json"  # transformers.trainer has the name too, but importing that takes a second


def set_aside_restored(output_dir: Path, folder: Path, step: int) -> list[Path]:
    """Move what an earlier training left into the run folder: its final models, and the restored folders of
    checkpoints later than `step`. Raw checkpoints stay where they are. Returns the new places.
    """
    moved = set_aside_alone(output_dir, folder)
    for restored in sorted(output_dir.glob(f"checkpoint-*/{RESTORED}")):
        number = restored.parent.name.removeprefix("checkpoint-")
        if number.isdigit() and int(number) > step:
            moved.append(set_aside(restored, folder, restored.parent.name))
    if (folder / FINAL).is_dir():
        moved.append(set_aside(folder / FINAL, folder, FINAL))
    return moved


def set_aside_alone(output_dir: Path, folder: Path) -> list[Path]:
    """Remove checkpoints that hold nothing but a restored model, which is moved into the run folder.

    A rotation that was killed leaves them, and resuming would take one for a checkpoint. Returns the new places.
    """
    moved = []
    for restored in sorted(output_dir.glob(f"checkpoint-*/{RESTORED}")):
        if holds_only_restored(restored.parent):
            moved.append(set_aside(restored, folder, restored.parent.name))
            restored.parent.rmdir()
    return moved


def holds_only_restored(checkpoint: Path) -> bool:
    """Whether nothing is in a checkpoint's folder but its restored model."""
    return set(os.listdir(checkpoint)) <= {RESTORED}


def set_aside(made: Path, folder: Path, name: str) -> Path:
    """Move a folder or file of the guard's to `superseded/name` in the run folder; returns its new place.

    Later ones of the same name are `name_2`, `name_3` and so on: a run may start again hundreds of times. The times of
    the folder around it stay as they are: Trainer's rotation goes by those of checkpoints.
    """
    target = folder / SUPERSEDED / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        later = (target.with_name(f"{name}_{n}") for n in count(2))
        target = next(place for place in later if not place.exists())
    before = made.parent.stat()
    shutil.move(made, target)  # the run folder may be on another file system
    os.utime(made.parent, ns=(before.st_atime_ns, before.st_mtime_ns))
    return target


def saved_folder(output_dirs: Sequence[Path], state: TrainerState) -> Path:
    """The checkpoint folder that Trainer has just written: the one whose file holds this very state of training.

    Hyperparameter search saves a level deeper, in `run-N/checkpoint-M` or under the names that `hp_name` gives, and
    other trials may write beside this one. Where no file holds this state (another callback may have changed it), the
    file written last counts; where there is none, the folder of that name in the first of `output_dirs`.
    """
    name = f"checkpoint-{state.global_step}"
    places = [f"{name}/{TRAINER_STATE}", f"*/{name}/{TRAINER_STATE}"]
    found = [file for folder in output_dirs for place in places for file in folder.glob(place)]
    if len(found) < 2:
        return found[0].parent if found else output_dirs[0] / name
    now = json.dumps(asdict(state), sort_keys=True, default=str)

    def likelihood(file: Path) -> tuple[bool, float]:
        try:
            holds_it = json.dumps(json.loads(file.read_text(encoding="utf-8")), sort_keys=True) == now
        except (OSError, ValueError):  # another trial's, being written or rotated away
            return False, 0.0
        return holds_it, file.stat().st_mtime

    return max(found, key=likelihood).parent


class SeenSaves:
    """The checkpoints of one `train()` that events told of, and the one that none did; rank 0's.

    Trainer's just-in-time checkpoint fires no event when SIGTERM stops a training (`enable_jit_checkpoint`,
    transformers 5.23). It may be of the step before the last one, and write an earlier checkpoint of its step anew.
    """

    def __init__(self) -> None:
        self._since = time.time()
        self._times: dict[Path, int] = {}

    def note(self, checkpoint: Path) -> Path:
        """An event told of this checkpoint, which is returned."""
        file = checkpoint / TRAINER_STATE
        self._times[file] = _written_at(file) if file.is_file() else 0
        return checkpoint

    def unseen(self, output_dir: Path) -> Path | None:
        """The checkpoint that was last written since the beginning, if no event told of it; logged."""
        files = sorted(output_dir.glob(f"checkpoint-[0-9]*/{TRAINER_STATE}"), key=_written_at)
        last = files[-1] if files else None
        if last is None or last.stat().st_mtime < self._since or self._times.get(last) == _written_at(last):
            return None
        logger.warning(
            "Training was stopped right after %s was saved. Time is short: it is restored, but nothing is measured, "
            "and no final models are written. Resume the run.",
            last.parent,
        )
        return last.parent


def _written_at(file: Path) -> int:
    return file.stat().st_mtime_ns


def remove_leftovers(output_dir: Path, folder: Path) -> None:
    """Remove what killed processes left half-written in a training's output folder and run folder."""
    remove_abandoned(output_dir.glob(f"{TEMPORARY}*"))
    for checkpoint in (*output_dir.glob("checkpoint-*"), *output_dir.glob("*/checkpoint-*"), folder):
        remove_abandoned(checkpoint.rglob(f"{TEMPORARY}*"))


def drop_later_rows(metrics: Path, step: int) -> None:
    """Remove the rows of steps later than `step` from a metrics file."""
    rows = [row for row in read_rows(metrics) if row["step"] <= step]
    fresh = metrics.with_suffix(".part")
    fresh.write_text("".join(f"{json.dumps(finite(row), allow_nan=False)}\n" for row in rows))
    fresh.replace(metrics)
