"""A guarded run read back from its folder: drift and probes by step, and what was written."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qkguard.checkpoint.manifest import MANIFEST, load_manifest
from qkguard.errors import QKGuardError
from qkguard.probe.results import wilson

logger = logging.getLogger(__name__)

RUN_FOLDER = "_qkguard"
"""Where a run's own files lie in its output folder; `push_to_hub` leaves out what begins with an underscore."""

METRICS = "metrics.jsonl"

DRIFT = "qkguard/drift/"
SUFFIXES = {"raw": "", "restored": "_restored"}


@dataclass(frozen=True)
class Share:
    """Needles found: a proportion with Wilson's 95% interval."""

    hits: float
    count: int

    def with_cell(self, cell: Mapping[str, Any]) -> Share:
        """This and the needles of a cell of `ProbeRow.cells`."""
        return Share(self.hits + cell["recall"] * cell["count"], self.count + cell["count"])

    @property
    def recall(self) -> float:
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(round(self.hits), self.count)


@dataclass(frozen=True)
class ProbeRow:
    """One probe of the raw or the restored weights.

    `cells`: {"task", "length", "depth", "recall", "count"}; `needle`: {"length", "layers", "heads"}, the attention on
    the needle by layer and head; `change`: the paired difference of recall with its 95% interval, from the probe
    before training for raw weights, from the raw weights of the same step for restored ones.
    """

    step: int
    weights: str
    recall: float
    answer_logprob: float
    cells: Sequence[Mapping[str, Any]]
    needle: Sequence[Mapping[str, Any]]
    change: Mapping[str, float] | None

    def by(self, name: str) -> dict[Any, Share]:
        """Recall by "task", "length" or "depth"."""
        out: dict[Any, Share] = {}
        for cell in self.cells:
            out[cell[name]] = out.get(cell[name], Share(0, 0)).with_cell(cell)
        return dict(sorted(out.items()))

    @property
    def total(self) -> Share:
        parts = self.by("task").values()
        return Share(sum(p.hits for p in parts), sum(p.count for p in parts))


@dataclass(frozen=True)
class Run:
    """`rows` are those of metrics.jsonl; `manifest` is that of the last restored folder, if one was written."""

    folder: Path
    rows: Sequence[Mapping[str, Any]]
    manifest: Mapping[str, Any] | None
    restored_folders: Sequence[Path]

    @property
    def name(self) -> str:
        return self.folder.resolve().parent.name if self.folder.name == RUN_FOLDER else self.folder.name

    @cached_property
    def probes(self) -> list[ProbeRow]:
        return [probe for row in self.rows for probe in probes_of(row)]

    def last(self, weights: str) -> ProbeRow | None:
        """The last probe of "raw" (after the first step) or "restored" weights; the first of all for "before"."""
        if weights == "before":
            return next((p for p in self.probes if p.step == 0 and p.weights == "raw"), None)
        return next((p for p in reversed(self.probes) if p.weights == weights and p.step > 0), None)

    @cached_property
    def layers(self) -> list[str]:
        """Labels of the layers with drift, "layer_3", in the order of the model."""
        found = {key[len(DRIFT) :].split("/")[0] for key in self._series if key.startswith(f"{DRIFT}layer_")}
        return sorted(found, key=lambda label: [int(part) for part in label.split("_")[1:]])

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric."""
        return self._series.get(name, [])

    @cached_property
    def _series(self) -> dict[str, list[tuple[int, float]]]:
        out: dict[str, list[tuple[int, float]]] = {}
        for row in self.rows:
            for key, value in row.items():
                if key.startswith("qkguard/"):
                    out.setdefault(key, []).append((row["step"], value))
        return out

    def final(self, name: str) -> float | None:
        values = self.series(name)
        return values[-1][1] if values else None


def probes_of(row: Mapping[str, Any]) -> Iterable[ProbeRow]:
    """The probes that one row of metrics.jsonl holds."""
    for weights, suffix in SUFFIXES.items():
        name = f"qkguard/niah{suffix}"
        if f"{name}/recall" in row:
            yield ProbeRow(
                step=row["step"],
                weights=weights,
                recall=row[f"{name}/recall"],
                answer_logprob=row[f"{name}/answer_logprob"],
                cells=row.get(f"niah{suffix}_grid", ()),
                needle=row.get(f"niah{suffix}_needle_mass", ()),
                change=row.get(f"niah{suffix}_change"),
            )


def load_run(folder: Path) -> Run:
    """A run from its output folder or from the `_qkguard` folder in it.

    Raises:
        QKGuardError: no such folder, no metrics in it, or a damaged manifest of its last restored folder.
    """
    if not folder.is_dir():
        raise QKGuardError(f"no such folder: {folder}; give the output_dir of a guarded run")
    inner = folder / RUN_FOLDER if (folder / RUN_FOLDER / METRICS).is_file() else folder
    if not (inner / METRICS).is_file():
        raise QKGuardError(f"{folder} has no {RUN_FOLDER}/{METRICS}; give the output_dir of a guarded run")
    rows = read_metrics(inner)
    written = [*_manifests(inner.parent, "checkpoint-*"), *_manifests(inner, "final")]
    merged = inner / "final/merged_qk_restored" / MANIFEST
    written += [merged] if merged.is_file() else []
    manifest = load_manifest(written[-1].parent) if written else None
    return Run(inner, rows, manifest, [path.parent for path in written])


def _manifests(folder: Path, pattern: str) -> list[Path]:
    """Manifests of restored models, and a level deeper of restored adapters, in the order of their steps."""
    found = [p for deep in ("", "*/") for p in folder.glob(f"{pattern}/qk_restored/{deep}{MANIFEST}")]
    return sorted(found, key=lambda p: (_step(p.relative_to(folder).parts[0]), str(p)))


def _step(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, oldest first; `folder` is the run's `_qkguard` folder."""
    return read_rows(folder / METRICS)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; lines that a crash or a full disk has cut short are left out with a warning."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            row["step"]
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            if line.strip():
                logger.warning("%s: line %d is damaged and left out", path, number)
    return rows
