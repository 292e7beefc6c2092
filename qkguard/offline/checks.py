"""What `probe` and `sweep` refuse at once: arguments, files and folders, before torch and a model are loaded.

Each is refused later too, by whoever needs it; here it costs a user no minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkguard.checkpoint.weights import resolve_folder
from qkguard.checkpoint.write import check_target
from qkguard.choice.candidates import control_candidates, method_candidates
from qkguard.errors import QKGuardError
from qkguard.layout.rows import RowSelection
from qkguard.offline.pair import known_pair, open_folders
from qkguard.probe.haystack import check_source
from qkguard.probe.samples import plan

CONFIGS = ("config.json", "adapter_config.json")


def check_samples(
    tasks: Sequence[str], lengths: Sequence[int], depths: int | Sequence[float], samples: int, haystack: Any
) -> None:
    """Refuse tasks that are not known, depths out of range and a haystack that cannot be read."""
    plan(tasks, lengths, depths, samples)
    check_source(haystack)


def check_models(models: Sequence[str]) -> None:
    """Refuse folders that hold no model, and hub ids that neither the hub nor its cache knows."""
    for name in models:
        folder = resolve_folder(name)
        if not any((folder / config).is_file() for config in CONFIGS):
            raise QKGuardError(f"{folder} has no config.json: expected a checkpoint with its configuration.")


def check_file(file: str | Path | None, what: str) -> None:
    """Refuse a file to read that is not there."""
    if file is not None and not Path(file).is_file():
        raise QKGuardError(f"{file}: no such file; expected {what}.")


def check_tolerance(tolerance: float) -> None:
    """Refuse a tolerance below 0, and NaN."""
    if not tolerance >= 0:
        raise QKGuardError(f"Invalid tolerance={tolerance!r}: expected a number >= 0.")


def check_sweep(
    base: str,
    tuned: str,
    *,
    methods: str | None,
    controls: str,
    tolerance: float,
    write: Path | None,
    overwrite: bool,
    rows: RowSelection,
    spec: Path | None,
) -> None:
    """Refuse a grid, a target or a pair of checkpoints that `sweep` would refuse; a layout only where it is known."""
    check_tolerance(tolerance)
    method_candidates(methods)
    control_candidates(controls)
    folders = open_folders(base, tuned)
    if write is not None:
        check_target([folders.base.folder, folders.tuned.folder], write, overwrite)
    if spec is None:
        known_pair(folders, rows=rows)
