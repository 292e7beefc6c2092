"""A guarded run read back from its folder: drift and probes by step, and what was written."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import nan
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from qkguard.checkpoint.manifest import MANIFEST, load_manifest, reference_of
from qkguard.errors import QKGuardError
from qkguard.probe.retrieval import RetrievalChoice
from qkguard.probe.statistics import at_floor, wilson

logger = logging.getLogger(__name__)

RUN_FOLDER = "_qkguard"
"""Where a run's own files lie in its output folder; `push_to_hub` leaves out what begins with an underscore."""

METRICS = "metrics.jsonl"

RETRIEVAL_LAYERS = "retrieval.json"
"""In a run folder, which layers `layers="retrieval"` stands for in this run."""

DRIFT = "qkguard/drift/"
SUFFIXES: dict[Literal["raw", "restored"], str] = {"raw": "", "restored": "_restored"}


@dataclass(frozen=True)
class Proportion:
    """Needles found of those asked for."""

    hits: float
    count: int

    @property
    def recall(self) -> float:
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval."""
        return wilson(round(self.hits), self.count)

    @property
    def at_floor(self) -> bool:
        """Whether so few needles are found that no loss can be seen."""
        return at_floor(round(self.hits), self.count)


@dataclass(frozen=True)
class ProbeRow:
    """One probe of the raw or the restored weights, as a row of metrics.jsonl tells it.

    `groups`: {"task", "length", "depth", "recall", "count"}; `needle_mass`: {"length", "layers", "heads"}, the
    attention on the needle by layer and head; `attention`: {"length", "layers", "needle_mass", "local_mass",
    "distance"}, means over heads by layer, distances in tokens; `change`: {"value", "low", "high", "before",
    "count"}, the paired difference of recall with its 95% interval: raw weights against the probe before training,
    restored ones against the raw ones of that step; `before` is the recall that is compared with, on the `count`
    samples that both have. `before`: groups of the probe before training on these samples, where it asked more.
    `falls`: where recall has fallen beyond noise, {"where", "before", "now", "low", "high", "count"}, the largest
    first.
    """

    step: int
    weights: Literal["raw", "restored"]
    recall: float
    groups: Sequence[Mapping[str, Any]]
    needle_mass: Sequence[Mapping[str, Any]]
    attention: Sequence[Mapping[str, Any]]
    change: Mapping[str, float] | None
    before: Sequence[Mapping[str, Any]] = ()
    falls: Sequence[Mapping[str, Any]] = ()

    def by(self, name: str) -> dict[Any, Proportion]:
        """Recall by "task", "length" or "depth", in their order."""
        return self._grouped(itemgetter(name))

    def by_place(self) -> dict[tuple[float, int], Proportion]:
        """Recall by (depth, length), tasks together."""
        return self._grouped(itemgetter("depth", "length"))

    @property
    def total(self) -> Proportion:
        return _pooled(self.groups)

    def _grouped(self, key_of: Callable[[Mapping[str, Any]], Any]) -> dict[Any, Proportion]:
        members: dict[Any, list[Mapping[str, Any]]] = {}
        for group in self.groups:
            members.setdefault(key_of(group), []).append(group)
        return {key: _pooled(members[key]) for key in sorted(members)}


def _on(groups: Sequence[Mapping[str, Any]], probe: ProbeRow) -> ProbeRow:
    """A probe as it is on fewer samples."""
    return replace(probe, groups=groups, recall=_pooled(groups).recall)


def _pooled(groups: Sequence[Mapping[str, Any]]) -> Proportion:
    hits = sum(group["recall"] * group["count"] for group in groups)
    return Proportion(hits, sum(group["count"] for group in groups))


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
        """All probes, in the order of the run; the one before training on the samples that the last ones asked."""
        found = [probe for row in self.rows for probe in probes_in(row)]
        fewer = next((probe.before for probe in reversed(found) if probe.before), None)
        if fewer:
            return [_on(fewer, probe) if probe.step == 0 and probe.weights == "raw" else probe for probe in found]
        return found

    def probe_of(self, weights: str) -> ProbeRow | None:
        """The probe "before" training, or the last one of the "raw" or "restored" weights after the first step."""
        if weights == "before":
            return next((p for p in self.probes if p.step == 0 and p.weights == "raw"), None)
        return next((p for p in reversed(self.probes) if p.weights == weights and p.step > 0), None)

    def probes_with(self, detail: str) -> dict[str, ProbeRow]:
        """Those probes of "before", "raw" and "restored" that hold "groups", "needle_mass" or "attention"."""
        found = {weights: self.probe_of(weights) for weights in ("before", "raw", "restored")}
        return {weights: probe for weights, probe in found.items() if probe is not None and getattr(probe, detail)}

    @cached_property
    def verdict(self) -> Mapping[str, Any] | None:
        """Which model to ship, as measured when training ended (`training/final_verdict`); None without one.

        A training that went on after it has made it out of date.
        """
        found = [(number, row["verdict"]) for number, row in enumerate(self.rows) if row.get("verdict")]
        if not found or any(row["step"] > self.rows[found[-1][0]]["step"] for row in self.rows):
            return None
        return found[-1][1]

    @cached_property
    def retrieval(self) -> RetrievalChoice | None:
        """Which layers `layers="retrieval"` stands for, with the scores; None in a run without it."""
        found = [row["retrieval"] for row in self.rows if row.get("retrieval")]
        return RetrievalChoice.from_json(found[-1]) if found else None

    @cached_property
    def layers(self) -> list[str]:
        """Labels of the layers with drift, "layer_3", in the order of the model."""
        found = {key.removeprefix(DRIFT).split("/")[0] for key in self.names(f"{DRIFT}layer_")}
        return sorted(found, key=_layer_numbers)

    def names(self, prefix: str) -> list[str]:
        """The metrics that begin so, in the order in which they were first logged."""
        return [name for name in self._series if name.startswith(prefix)]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric in the order of the steps, the last value logged where there are several."""
        return sorted(dict(self._series.get(name, [])).items())

    def values(self, name: str) -> list[float]:
        """All values of a metric as they were logged: the last one is the final weights', whatever step it has."""
        return [value for _, value in self._series.get(name, [])]

    def last_value(self, name: str) -> float | None:
        values = self.values(name)
        return values[-1] if values else None

    @cached_property
    def _series(self) -> dict[str, list[tuple[int, float]]]:
        out: dict[str, list[tuple[int, float]]] = {}
        for row in self.rows:
            for key, value in row.items():
                if key.startswith("qkguard/"):
                    out.setdefault(key, []).append((row["step"], _numbers(value)))
        return out


def _numbers(value: Any) -> Any:
    """A number, or tables of them, as measured: `metrics.jsonl` has null for what was not finite."""
    if value is None:
        return nan
    if isinstance(value, Mapping):
        return {key: _numbers(found) for key, found in value.items()}
    return [_numbers(found) for found in value] if isinstance(value, list) else value


def _layer_numbers(label: str) -> list[int]:
    """ "layer_3" -> [3]; a module with several attentions has "layer_3_1"."""
    return [int(part) for part in label.split("_")[1:]]


def probes_in(row: Mapping[str, Any]) -> Iterable[ProbeRow]:
    """The probes that one row of metrics.jsonl holds."""
    for weights, suffix in SUFFIXES.items():
        recall = row.get(f"qkguard/niah{suffix}/recall")
        if recall is not None:
            yield ProbeRow(
                step=row["step"],
                weights=weights,
                recall=recall,
                groups=row.get(f"niah{suffix}_grid", ()),
                needle_mass=_numbers(row.get(f"niah{suffix}_needle_mass", ())),
                attention=_numbers(row.get(f"niah{suffix}_attention", ())),
                change=_numbers(row.get(f"niah{suffix}_change", {})) or None,
                before=row.get(f"niah{suffix}_before_grid", ()),
                falls=row.get(f"niah{suffix}_falls", ()),
            )


def load_run(folder: Path) -> Run:
    """A run from its output folder or from the `_qkguard` folder in it.

    Raises:
        QKGuardError: no such folder, no metrics in it, or a damaged manifest of its last restored folder.
    """
    if not folder.is_dir():
        raise QKGuardError(f"{folder}: no such folder; give the output_dir of a guarded run")
    inner = folder / RUN_FOLDER if (folder / RUN_FOLDER / METRICS).is_file() else folder
    if not (inner / METRICS).is_file():
        raise QKGuardError(f"{folder}: there is no {RUN_FOLDER}/{METRICS} in it; give the output_dir of a guarded run")
    manifests = [*_manifests(inner.parent, "checkpoint-*"), *_manifests(inner, "final")]
    if inner.name != RUN_FOLDER:  # checkpoints beside a run folder of another name may be another run's
        manifests = [path for path in manifests if path.is_relative_to(inner) or _is_made_with(inner, path)]
    merged = inner / "final/merged_qk_restored" / MANIFEST
    if merged.is_file():
        manifests.append(merged)
    last = load_manifest(manifests[-1].parent) if manifests else None
    return Run(inner, read_metrics(inner), last, [path.parent for path in manifests])


def _is_made_with(run_folder: Path, manifest: Path) -> bool:
    """Whether a restored model's rows come from the reference in a run folder."""
    try:
        reference = reference_of(manifest.parent)
    except QKGuardError:
        return False
    return reference is not None and reference.parent == run_folder.resolve()


def _manifests(folder: Path, pattern: str) -> list[Path]:
    """Manifests of restored models, and a level deeper of restored adapters, in the order of their steps."""
    found = [*folder.glob(f"{pattern}/qk_restored/{MANIFEST}"), *folder.glob(f"{pattern}/qk_restored/*/{MANIFEST}")]
    return sorted(found, key=_step_and_path)


def _step_and_path(manifest: Path) -> tuple[int, str]:
    """ "run/checkpoint-40/qk_restored/qkguard.json" -> (40, the path); 0 where there is no step, as in final/."""
    folders = [part for part in manifest.parts if part.startswith("checkpoint-")]
    step = folders[-1].removeprefix("checkpoint-") if folders else ""
    return int(step) if step.isdigit() else 0, str(manifest)


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
                logger.warning("%s: line %d is damaged; it is left out", path, number)
    return rows
