"""Rows held out from SFT, to measure task quality on: read from files, or kept by a run of its evaluation set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qkguard.checkpoint.manifest import reference_of
from qkguard.choice.task import ROW_FORMATS
from qkguard.errors import QKGuardError
from qkguard.probe.passes import IGNORED
from qkguard.report.run import METRICS, RUN_FOLDER

HELDOUT, SEEN = "heldout.jsonl", "seen.jsonl"  # of the evaluation set; else of the training data
CHECKPOINT = re.compile(r"checkpoint-\d+")
ROWS = 128  # kept of a data set, at most

Tokenised = dict[str, list[int]]
"""A row as {"input_ids", "labels"}: token ids, and -100 where nothing is to be predicted."""


def read_rows(data: Any, limit: int | None = None) -> list[Mapping[str, Any]]:
    """Rows of a JSON-lines file, or of any iterable of mappings (a `datasets.Dataset`), the first `limit` of them.

    Raises:
        QKGuardError: no such file, a line that is no JSON object, or no rows.
    """
    if not isinstance(data, str | Path):
        rows = list(data)
    else:
        path = Path(data)
        if not path.is_file():
            raise QKGuardError(f"{path}: no such file; expected JSON lines, {ROW_FORMATS}.")
        try:
            text = path.read_text(encoding="utf-8")
            whole = text.lstrip().startswith("[")
            rows = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise QKGuardError(f"{path} is not JSON lines ({error}); expected {ROW_FORMATS}.") from None
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        name = data if isinstance(data, str | Path) else "data"
        raise QKGuardError(f"{name} holds no rows; expected {ROW_FORMATS}.")
    return rows[:limit]


def keep_rows(rows: Sequence[Tokenised], file: Path) -> None:
    """Keep tokenised rows as JSON lines; no file where there are none."""
    if rows:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def own_labels(row: Mapping[str, Any]) -> list[int]:
    """The labels of a tokenised row, by its own masks where it has no labels."""
    if row.get("labels") is not None:
        return list(row["labels"])
    mask = row.get("assistant_masks") or row.get("completion_mask") or [1] * len(row["input_ids"])
    return [token if keep else IGNORED for token, keep in zip(row["input_ids"], mask, strict=True)]


def find_rows(tuned: Path) -> Path | None:
    """The rows of its evaluation set that the run kept which wrote a folder, if it kept any."""
    run = find_run(tuned)
    return run / HELDOUT if run is not None and (run / HELDOUT).is_file() else None


def find_run(tuned: Path) -> Path | None:
    """The run folder of the guarded run that wrote a folder; None for a hub id, whatever folders are around.

    A folder is a run's by its place in it (its output folder, checkpoints and final models), else by the reference
    that the manifest of its restored model names. That it lies in or beside a run says nothing.
    """
    if not tuned.is_dir():
        return None
    return _run_by_place(tuned.resolve()) or _run_by_manifest(tuned)


def _run_by_place(folder: Path) -> Path | None:
    """The run folder of the run in which a folder lies where runs write their models."""
    for above in (folder, *folder.parents):
        inside = folder.relative_to(above).parts
        if (above / RUN_FOLDER / METRICS).is_file() and _is_written_by_trainer(above, inside):
            return above / RUN_FOLDER
        if (above / METRICS).is_file() and inside[:1] == ("final",):
            return above
    return None


def _is_written_by_trainer(output_dir: Path, inside: Sequence[str]) -> bool:
    """Whether a path below an output folder is that folder, a checkpoint, or lies in a checkpoint."""
    if not inside or CHECKPOINT.fullmatch(inside[0]):
        return True
    if len(inside) < 2 or not CHECKPOINT.fullmatch(inside[1]):
        return False
    try:  # of a hyperparameter search, or another trainer's below this folder
        state = json.loads(output_dir.joinpath(*inside[:2], "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(state.get("is_hyper_param_search"))


def _run_by_manifest(folder: Path) -> Path | None:
    """The run folder whose reference the restored model in `folder`, or in its `qk_restored`, was made with."""
    for restored in (folder, folder / "qk_restored"):
        with suppress(QKGuardError):  # no manifest, or none that this version reads
            reference = reference_of(restored)
            if reference is not None and (reference.parent / METRICS).is_file():
                return reference.parent
    return None


def sampled(dataset: Any, at_most: int) -> Iterator[dict[str, Any]]:
    """Up to so many rows as stored, from everywhere in a `datasets.Dataset`.

    None of other kinds: reading streams and data sets of one's own may use up their rows or random numbers.
    """
    if type(dataset).__module__.startswith("datasets.") and hasattr(dataset, "__len__"):  # a stream has none
        plain = dataset.with_format(None)
        for i in range(0, len(plain), max(1, -(-len(plain) // at_most))):
            yield plain[i]
