"""`sweep`: recall and task quality of raw, base and a grid of restores, with one model in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from qkguard.checkpoint.patched_folder import check_target
from qkguard.checkpoint.restored import fallbacks
from qkguard.choice.candidates import Point, control_points, layer_points, method_points
from qkguard.choice.heldout import find_rows
from qkguard.choice.task import FORMS, Row, TaskResult, encode_rows, read_rows, score_rows
from qkguard.choice.verdict import Measured, compare, rank_layers, recommend, rule, within, words
from qkguard.errors import QKGuardError, current_names
from qkguard.layout.rows import RowOptions, RowSelection
from qkguard.offline.pair import find_pair, open_folders, read_config
from qkguard.offline.probe import (
    ProbeSettings,
    choose_chunk,
    free_memory,
    load_model,
    load_tokenizer,
    run_within_memory,
)
from qkguard.offline.restore import restore_checkpoint
from qkguard.offline.sweep_swap import Change, Swapper
from qkguard.probe.lengths import check_lengths, default_lengths
from qkguard.probe.prober import TASKS, Prober, Progress
from qkguard.probe.results import ProbeResult
from qkguard.restore import check_device

Bar = Callable[[str], AbstractContextManager[Progress]]
TASK_TOKENS = 4096  # in one forward pass that scores task rows: their logits are the memory
FLOATS = ("float32", "bfloat16", "float16")
VERSION = 1


@dataclass
class SweepReport:
    """What a sweep found. `warnings` are sentences for the user."""

    base: str
    tuned: str
    points: list[Measured]
    recommended: Measured
    settings: dict[str, Any]
    tolerance: float
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def metric(self) -> str | None:
        """What task quality is: "accuracy", "loss" or None."""
        task = self.points[0].task
        return None if task is None else "loss" if task.accuracy is None else "accuracy"

    @property
    def rule(self) -> str:
        return rule(self.tolerance, self.metric)

    @property
    def words(self) -> list[str]:
        return words(self.points, self.recommended, self.tolerance)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {
            "version": VERSION,
            "base": self.base,
            "tuned": self.tuned,
            "recommended": self.recommended.name,
            "rule": self.rule,
            "words": self.words,
            "metric": self.metric,
            "points": [self._point(point) for point in self.points],
            "layers": rank_layers(self.points),
            "settings": self.settings,
            "warnings": self.warnings,
            "seconds": self.seconds,
        }

    def summary(self) -> dict[str, Any]:
        """The part that goes into the manifest of a checkpoint written by the recommendation."""
        keys = ("name", "recall", "task", "pareto")
        points = [{k: v for k, v in self._point(p).items() if k in keys} for p in self.points]
        return {"recommended": self.recommended.name, "rule": self.rule, "words": self.words, "points": points}

    def _point(self, point: Measured) -> dict[str, Any]:
        task = None
        if point.task is not None and point.quality is not None and point.change is not None:
            task = {"loss": point.task.loss, "accuracy": point.task.accuracy, "quality": point.quality.to_json()}
            task |= {"change": point.change.to_json(), "within_tolerance": within(point, self.tolerance)}
        return {
            "name": point.name,
            "kind": point.point.kind,
            "method": point.point.method if point.point.tensors else None,
            "options": dict(point.point.options),
            "tensors": list(point.point.tensors),
            "layers": None if point.point.layers is None else list(point.point.layers),
            "recall": point.recall.to_json(),
            "gain": point.gain.to_json(),
            "recall_by_length": {str(n): g.recall for (n,), g in point.probe.by("length").items()},
            "answer_logprob": point.probe.answer_logprob,
            "task": task,
            "pareto": point.pareto,
            "same_as": point.same_as,
            "did": point.layers,
        }


def sweep(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    data: Any = None,
    methods: Sequence[str] | str | None = None,
    controls: Sequence[str] | str = (),
    each_layer: bool = False,
    tolerance: float = 0.02,
    write: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    lengths: Sequence[int] | None = None,
    depths: int | Sequence[float] = 5,
    samples: int = 2,
    tasks: Sequence[str] = TASKS,
    haystack: Any = None,
    mode: str = "auto",
    seed: int = 0,
    rows: int = 256,
    max_length: int = 4096,
    spec: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    batch_tokens: int = 16384,
    chunk: int | None = None,
    trust_remote_code: bool = False,
    bar: Bar | None = None,
    **selected: Unpack[RowOptions],
) -> SweepReport:
    """Measure which restore keeps recall and skill on a run: raw, base and a grid of methods and strengths.

    The tuned model is loaded once; each point swaps its tensors in and out again to the bit. The base is loaded before
    it and let go. Equal settings and seeds give equal numbers.

    Args:
        base, tuned: folders, or hub ids, in safetensors.
        data: rows held out from SFT, for task quality: a JSON-lines file or an iterable of mappings with "prompt" and
            "completion" or "answer", "messages", or "text" (`task.encode_rows`). "none" measures recall alone. By
            default those that the guarded run around `tuned` kept of its evaluation set.
        methods: the grid (`points.method_points`); default restore, keys only, and qk-pro and interpolate at a few
            strengths.
        controls: some of "q", "k", "v", "o", "vo", or "all": single projections taken back, to see what the cause is.
        each_layer: also restore one layer at a time.
        tolerance: how much task quality a recommended point may lose: a share of accuracy, or nats per token of loss.
        write: write the recommended checkpoint there (`restore_checkpoint`), unless it is raw.
        overwrite: replace an earlier restored folder at `write`.
        lengths, depths, samples, tasks, haystack, mode, seed: of the probe (`Prober`); lengths default to what fits
            the model of 512, 1024 and 2048 tokens. `seed` also draws the bootstrap.
        rows, max_length: at most so many rows, of at most so many tokens.
        spec: a layout by hand (`restore_checkpoint`).
        dtype, device, batch_tokens, chunk: how the models run (`ProbeSettings`).
        trust_remote_code: allow the checkpoints' own model code to be imported.
        bar: called with a label, gives a context with a progress function.
        selected: which rows are restored, as the fields of `RowSelection` but `projections`, which the points choose.

    Raises:
        QKGuardError: bad settings, data or checkpoints, found before anything is measured where that is possible.
    """
    began = time.perf_counter()
    if data is None:
        data = find_rows(Path(tuned))
    if data is None:
        raise QKGuardError(
            "no data to measure task quality on: the tuned checkpoint lies in no guarded run that kept rows of its "
            f"evaluation set; give rows held out from SFT (--data FILE.jsonl: {FORMS}), or measure recall alone "
            "(--data none)"
        )
    if not tolerance >= 0:
        raise QKGuardError(f"tolerance={tolerance!r} is not known; expected a number from 0")
    given: dict[str, Any] = current_names(selected)
    each_layer = given.pop("per_layer", each_layer)  # under its old name
    if "projections" in given:
        raise QKGuardError("Projections are chosen point by point in a sweep: methods=restore:projections=k")
    chosen = RowSelection.of(given)
    grid = [*method_points(methods), *control_points(controls)]
    found = None if isinstance(data, str) and data == "none" else read_rows(data, rows)
    folders = open_folders(base, tuned)
    base_folder, tuned_folder = folders.base.folder, folders.tuned.folder
    find_pair(
        folders, rows=chosen, spec=spec, trust_remote_code=trust_remote_code
    )  # refuses before hours of measuring
    if write is not None:
        check_target([base_folder, tuned_folder], Path(write), overwrite)
    settings = ProbeSettings(
        lengths=lengths or (), dtype=dtype, device=device, chunk=chunk, trust_remote_code=trust_remote_code
    )
    tokenizer = load_tokenizer(tuned_folder, settings, _tokenizer_or_none(base_folder, settings))
    encoded, dropped = encode_rows(tokenizer, found, max_length) if found is not None else (None, 0)
    warnings = list(folders.warnings)
    if dropped:
        warnings.append(f"{dropped} rows are longer than {max_length} tokens and were left out")

    # in the dtype of the tuned files, as SFT had it: rounding is no difference to measure
    config = read_config(tuned_folder)
    stored = config.get("dtype") or config.get("torch_dtype") if dtype == "auto" else None
    model = load_model(base_folder, replace(settings, dtype=stored if stored in FLOATS else dtype))
    settings = replace(settings, lengths=tuple(lengths or default_lengths(model)))
    warnings += check_lengths(model, settings.lengths)
    prober = Prober(
        tokenizer,
        lengths=settings.lengths,
        depths=depths,
        samples=samples,
        tasks=tasks,
        haystack=haystack,
        seed=seed,
        mode=mode,
        attention=False,
        batch_tokens=batch_tokens,
    )
    measure = Measure(prober, encoded, bar)
    prober.find_forms(model)
    warnings += choose_chunk(model, prober, settings)
    measured = [Measured(Point("base", "base"), *measure(model, "base"))]
    del model
    free_memory()
    model = load_model(tuned_folder, settings)
    swapper = Swapper(
        model,
        folders,
        spec=spec,
        device=check_device("cuda") if torch.cuda.is_available() and device != "cpu" else "cpu",
        rows=chosen,
    )
    wanted = [Point("raw", "raw"), *grid, *(layer_points(swapper.layers) if each_layer else ())]
    measured += measure_points(model, swapper, measure, wanted)
    compare(measured, seed)
    report = SweepReport(
        os.fspath(base),
        os.fspath(tuned),
        measured,
        recommend(measured, tolerance),
        prober.settings() | {"rows": len(encoded or ()), "tolerance": tolerance, "dtype": dtype},
        tolerance,
        warnings,
    )
    for point in measured:
        if point.point.kind == "method":
            report.warnings += fallbacks(point.name, point.layers)
    if any(point.probe.not_finite for point in measured):
        report.warnings.append("some points gave NaN or infinite outputs; these samples count as wrong")
    if write is not None and report.recommended.point.recommendable:
        del model, swapper
        free_memory()
        _write(report, write, overwrite=overwrite, rows=chosen, spec=spec, trust_remote_code=trust_remote_code)
    report.seconds = time.perf_counter() - began
    return report


class Measure:
    """Recall and task quality of whatever the model holds at the moment.

    Args:
        prober: with its answer forms found.
        rows: task rows; None measures recall alone.
    """

    def __init__(self, prober: Prober, rows: Sequence[Row] | None, bar: Bar | None = None) -> None:
        self.prober, self.rows, self.bar = prober, rows, bar

    def __call__(self, model: nn.Module, name: str) -> tuple[ProbeResult, TaskResult | None]:
        with self.bar(name) if self.bar else nullcontext(lambda done, total: None) as progress:
            probe = run_within_memory(model, self.prober, progress)
            return probe, None if self.rows is None else score_rows(model, self.rows, TASK_TOKENS)


def measure_points(model: nn.Module, swapper: Swapper, measure: Measure, points: Sequence[Point]) -> list[Measured]:
    """Every point in turn; those with the same weights are measured once. The model is afterwards as it was."""
    out: list[Measured] = []
    known: dict[str, Measured] = {}
    for number, point in enumerate(points, 1):
        change = swapper.change(point) if point.tensors else Change()
        if (same := known.get(change.digest)) is not None:
            out.append(Measured(point, same.probe, same.task, change.layers, same.name))
            continue
        with swapper.swapped(change):
            result = measure(model, f"{number}/{len(points)} {point.name}")
        out.append(known.setdefault(change.digest, Measured(point, *result, change.layers)))
    return out


def _write(report: SweepReport, out: str | os.PathLike[str], *, rows: RowSelection, **settings: Any) -> None:
    point = report.recommended.point
    restore_checkpoint(
        report.base,
        report.tuned,
        out,
        method=point.method,
        extra={"sweep": report.summary()},
        **dict(point.options),
        **settings,
        **(rows.to_json() | {"projections": point.tensors}),
    )


def _tokenizer_or_none(folder: Path, settings: ProbeSettings) -> Any:
    try:
        return load_tokenizer(folder, settings, None)
    except QKGuardError:
        return None
