"""What a resumed run sets aside: files of later steps, which belong to the branch that it leaves (one process)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from qkguard.report.run import read_rows

SUPERSEDED = "superseded"


def set_aside_restored(output_dir: Path, folder: Path, step: int) -> list[Path]:
    """Move restored folders of checkpoints later than `step` into the run folder; returns their new places.

    The checkpoints' times stay as they are: Trainer's rotation goes by them.
    """
    moved = []
    for restored in sorted(output_dir.glob("checkpoint-*/qk_restored")):
        checkpoint = restored.parent
        number = checkpoint.name.removeprefix("checkpoint-")
        if not number.isdigit() or int(number) <= step:
            continue
        target = folder / SUPERSEDED / checkpoint.name
        target.parent.mkdir(parents=True, exist_ok=True)
        while target.exists():
            target = target.with_name(target.name + "-older")
        before = checkpoint.stat()
        os.rename(restored, target)
        os.utime(checkpoint, ns=(before.st_atime_ns, before.st_mtime_ns))
        moved.append(target)
    return moved


def drop_later_rows(metrics: Path, step: int) -> None:
    """Remove the rows of steps later than `step` from a metrics file."""
    rows = [row for row in read_rows(metrics) if row["step"] <= step]
    fresh = metrics.with_suffix(".part")
    fresh.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    fresh.replace(metrics)
