"""Rows held out from SFT, to measure task quality on: read from files, or kept by a run of its evaluation set."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qkguard.choice.task import ROW_FORMATS
from qkguard.errors import QKGuardError
from qkguard.report.run import METRICS, RUN_FOLDER

HELDOUT = "heldout.jsonl"
ROWS = 128  # kept of an evaluation set, at most


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


def keep_rows(dataset: Any, folder: Path) -> None:
    """Write up to `ROWS` rows of a prepared `datasets.Dataset`, from everywhere in it; no file where there are none.

    A row is {"input_ids", "labels"}: token ids, and -100 where nothing is to be predicted. Packed rows and rows scored
    in several places are not kept, nor are rows of other kinds of data sets (`sampled`).
    """
    lines = []
    for row in sampled(dataset, ROWS):
        if "input_ids" not in row or "seq_lengths" in row:
            continue
        labels = _labels(row)
        begin = next((n for n, label in enumerate(labels) if label != -100), None)
        if begin is not None and -100 not in labels[begin:]:
            lines.append(json.dumps({"input_ids": list(row["input_ids"]), "labels": labels}))
    if lines:
        (folder / HELDOUT).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _labels(row: dict[str, Any]) -> list[int]:
    if row.get("labels") is not None:
        return list(row["labels"])
    mask = row.get("assistant_masks") or row.get("completion_mask") or [1] * len(row["input_ids"])
    return [token if keep else -100 for token, keep in zip(row["input_ids"], mask, strict=True)]


def find_rows(checkpoint: Path) -> Path | None:
    """The rows kept by the run that a checkpoint lies in, if it kept any."""
    for parent in [checkpoint.resolve(), *checkpoint.resolve().parents][:4]:
        for folder in (parent, parent / RUN_FOLDER):
            if (folder / HELDOUT).is_file() and (folder / METRICS).is_file():
                return folder / HELDOUT
    return None


def sampled(dataset: Any, at_most: int) -> Iterator[dict[str, Any]]:
    """Up to so many rows as stored, from everywhere in a `datasets.Dataset`.

    None of other kinds: reading streams and data sets of one's own may use up their rows or random numbers.
    """
    if type(dataset).__module__.startswith("datasets.") and hasattr(dataset, "__getitem__"):
        plain = dataset.with_format(None)
        for i in range(0, len(plain), max(1, -(-len(plain) // at_most))):
            yield plain[i]
