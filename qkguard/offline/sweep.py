"""`sweep`: recall and task quality of raw, base and a grid of restores, with one model in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from qkguard.checkpoint.manifest import fallback_warnings
from qkguard.checkpoint.write import check_target
from qkguard.choice.attribution import Attribution
from qkguard.choice.candidates import Candidate, control_candidates, layer_candidates, method_candidates
from qkguard.choice.task import ROW_FORMATS, TaskResult, TaskRow, encode_rows, score_rows
from qkguard.choice.verdict import Measurement, Verdict, compare, rank_layers, recommend
from qkguard.errors import QKGuardError, current_names
from qkguard.layout.rows import RowOptions, RowSelection
from qkguard.offline.checks import check_tolerance
from qkguard.offline.configs import read_config
from qkguard.offline.group_swap import GroupSwap, Measure, measure_groups
from qkguard.offline.models import (
    LoadOptions,
    OpenBar,
    choose_chunk,
    free_memory,
    load_model,
    load_tokenizer,
    no_bar,
    run_within_memory,
)
from qkguard.offline.pair import Folders, find_pair, open_folders
from qkguard.offline.restore import restore_checkpoint
from qkguard.offline.retrieval import are_wanted, choose_in_base, with_layers
from qkguard.offline.sweep_swap import CandidateRows, CandidateSwap
from qkguard.offline.task_rows import find_rows, read_rows
from qkguard.offline.whole import refuse_incomplete
from qkguard.probe.prober import Prober
from qkguard.probe.results import ProbeResult
from qkguard.probe.retrieval import RetrievalChoice
from qkguard.probe.settings import (
    DEFAULT_TASKS,
    ProbeSettings,
    check_lengths,
    default_lengths,
    lengths_left_out,
)
from qkguard.report.numbers import plural
from qkguard.restore.apply import check_device

FLOATS = ("float32", "bfloat16", "float16")
VERSION = 1


@dataclass(kw_only=True)
class SweepReport(Verdict):
    """What a sweep found. `warnings` are sentences for the user; `retrieval` says which layers hold retrieval heads,
    where a point restores these alone.
    """

    base: str
    tuned: str
    settings: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    retrieval: RetrievalChoice | None = None
    seconds: float = 0.0
    attribution: Attribution | None = None

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
            "points": [point.to_json(self.tolerance) for point in self.points],
            "layers": rank_layers(self.points),
            "attribution": None if self.attribution is None else self.attribution.to_json(self.tolerance),
            "retrieval": None if self.retrieval is None else self.retrieval.summary(),
            "settings": self.settings,
            "warnings": self.warnings,
            "seconds": self.seconds,
        }


def sweep(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    data: Any = None,
    methods: Sequence[str] | str | None = None,
    controls: Sequence[str] | str = (),
    each_layer: bool = False,
    attribute: bool = False,
    tolerance: float = 0.02,
    write: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    lengths: Sequence[int] | None = None,
    depths: int | Sequence[float] = 5,
    samples: int = 2,
    tasks: Sequence[str] = DEFAULT_TASKS,
    haystack: Any = None,
    haystack_per: str = "sample",
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
    bar: OpenBar = no_bar,
    **selected: Unpack[RowOptions],
) -> SweepReport:
    """Measure which restore keeps recall and skill on a run: raw, base and a grid of methods and strengths.

        report = qkguard.sweep("base", "tuned", data="heldout.jsonl", lengths=(1024, 4096), write="restored")
        print(report.recommended.name, *report.words)

    The tuned model is loaded once; each candidate swaps its tensors in and out again to the bit. The base is loaded
    before it and let go. Equal settings and seeds give equal numbers.

    Args:
        base: the checkpoint before SFT, a folder or hub id, in safetensors.
        tuned: the one after it, likewise.
        data: rows held out from SFT, for task quality: a JSON-lines file or an iterable of mappings with "prompt" and
            "completion" or "answer", "messages", or "text" (`task.encode_rows`). "none" measures recall alone. By
            default those that the guarded run around `tuned` kept of its evaluation set.
        methods: the grid (`candidates.method_candidates`); by default restore, restore of the retrieval layers alone
            (`probe.retrieval`), keys only, and qk-pro and interpolate at a few strengths.
        controls: some of "q", "k", "v", "o", "vo", or "all": single projections taken back, to see what the cause is.
        each_layer: also restore one layer at a time.
        attribute: also swap whole groups of weights (queries and keys, values and outputs, mixers, MLPs, norms and
            embeddings), each from the base alone and all but each, to see which of them lost the recall
            (`choice.attribution`): two measurements for every group that SFT changed.
        tolerance: how much task quality the recommended one may lose: a share of accuracy, or nats per token of loss.
        write: write the recommended checkpoint there (`restore_checkpoint`), unless it is raw.
        overwrite: replace an earlier restored folder at `write`.
        lengths: of the probe's contexts; by default what fits the model of 512, 1024 and 2048 tokens.
        depths: of the probe (`ProbeSettings`), as are `samples`, `tasks`, `haystack`, `haystack_per`, `mode` and
            `batch_tokens`.
        seed: of the probe; it also draws the bootstrap.
        rows: at most so many of the data.
        max_length: longer rows, in tokens, are left out.
        spec: a layout by hand (`restore_checkpoint`).
        dtype: how the models are loaded (`LoadOptions`), as `device` and `trust_remote_code` say too.
        chunk: read longer contexts in pieces of this many tokens, where the model's cache allows it (0 for never).
        bar: called with a label, gives a context with a progress function.
        selected: which rows are restored, as fields of `RowSelection` but `projections`, which the candidates choose.

    Raises:
        QKGuardError: bad settings, data or checkpoints, found before anything is measured where that is possible.
    """
    began = time.perf_counter()
    check_tolerance(tolerance)
    given: dict[str, Any] = current_names(selected)
    each_layer = given.pop("per_layer", each_layer)  # under its old name
    if "projections" in given:
        raise QKGuardError("A sweep chooses projections candidate by candidate: methods=restore:projections=k.")
    selection = RowSelection.of(given)
    grid = [*method_candidates(methods), *control_candidates(controls)]
    task_rows = _task_rows(data, Path(tuned), rows)
    load = LoadOptions(dtype, device, trust_remote_code)
    settings = ProbeSettings(
        lengths or (),
        depths,
        samples,
        tasks,
        haystack,
        seed,
        mode,
        attention=False,
        batch_tokens=batch_tokens,
        haystack_per=haystack_per,
    )

    folders = open_folders(base, tuned)
    pair = find_pair(folders, rows=selection, spec=spec, trust_remote_code=trust_remote_code)  # or refuses, at once
    for folder in (folders.base, folders.tuned):
        refuse_incomplete(folder, trust_remote_code=trust_remote_code)
    if write is not None:
        check_target([folders.base.folder, folders.tuned.folder], Path(write), overwrite)
    tokenizer = _tokenizer(folders, load)
    encoded, warnings = None, list(pair.warnings)
    if task_rows is not None:
        encoded, dropped = encode_rows(tokenizer, task_rows, max_length)
        warnings += [f"{dropped} rows are longer than {max_length} tokens and were left out"] if dropped else []

    model, prober, more = _open_base(folders, tokenizer, settings, load, chunk)
    measure = partial(_measure, prober, encoded, bar)
    prober.attention = prober.questions = are_wanted(grid)
    measured = [Measurement(Candidate("base", "base"), *measure(model, "base"))]
    retrieval = choose_in_base(model, measured[0].probe, selection, spec) if prober.questions else None
    grid, left_out = with_layers(grid, retrieval)
    prober.attention = prober.questions = False
    del model
    free_memory()

    model = load_model(folders.tuned.folder, load)
    arithmetic = check_device("cuda") if torch.cuda.is_available() and device != "cpu" else "cpu"
    swap = CandidateSwap(model, folders, rows=selection, spec=spec, device=arithmetic)
    groups = _open_groups(model, swap, folders, selection, bar) if attribute else None
    wanted = [Candidate("raw", "raw"), *grid, *(layer_candidates(swap.layers) if each_layer else ())]
    measured += measure_candidates(model, swap, measure, wanted)
    attribution = None
    if groups is not None:
        warnings += groups.warnings
        attribution = measure_groups(model, groups, measure, measured[0], measured[1], seed)
    del model, swap, groups
    free_memory()

    compare(measured, seed)
    report = SweepReport(
        base=os.fspath(base),
        tuned=os.fspath(tuned),
        points=measured,
        recommended=recommend(measured, tolerance),
        tolerance=tolerance,
        data=plural(len(encoded or ()), "row") if encoded else "",
        settings=prober.record() | {"rows": len(encoded or ()), "tolerance": tolerance, "dtype": dtype},
        attribution=attribution,
        warnings=[*warnings, *more, *left_out, *_warnings(measured)],
        retrieval=retrieval,
    )
    if write is not None and report.recommended.candidate.recommendable:
        _write(report, write, overwrite=overwrite, rows=selection, spec=spec, trust_remote_code=trust_remote_code)
    report.seconds = time.perf_counter() - began
    return report


def _open_base(
    folders: Folders, tokenizer: Any, settings: ProbeSettings, load: LoadOptions, chunk: int | None
) -> tuple[nn.Module, Prober, list[str]]:
    """The base, loaded, a prober that expects answers in its formats, and warnings."""
    dtype = load.dtype
    if dtype == "auto":  # that of the tuned files, as SFT had the base: rounding is no difference to measure
        config = read_config(folders.tuned.folder)
        stored = config.get("dtype") or config.get("torch_dtype")
        dtype = stored if stored in FLOATS else "auto"
    model = load_model(folders.base.folder, replace(load, dtype=dtype))
    lengths, lost = settings.lengths or default_lengths(model), lengths_left_out(model)
    if not lengths:
        raise QKGuardError(f"There is no context length to measure recall at: {lost}. Give --lengths.")
    more = [f"recall is measured at up to {max(lengths)} tokens: {lost}"] if lost and not settings.lengths else []
    settings = replace(settings, lengths=tuple(lengths))
    warnings = check_lengths(model, settings.lengths)
    prober = Prober(tokenizer, settings)
    prober.find_formats(model)
    return model, prober, more + warnings + choose_chunk(model, prober, chunk)


def _open_groups(
    model: nn.Module, swap: CandidateSwap, folders: Folders, rows: RowSelection, bar: OpenBar
) -> GroupSwap:
    """The groups of weights of the tuned model; both checkpoints are read once, so that a refusal comes early."""
    with bar("comparing all weights") as progress:
        return GroupSwap(
            model, folders, swap.specs, include_norms=rows.include_norms, shared=rows.shared, progress=progress
        )


def measure_candidates(
    model: nn.Module, swap: CandidateSwap, measure: Measure, candidates: Sequence[Candidate]
) -> list[Measurement]:
    """Every candidate in turn; those with the same weights are measured once. The model is afterwards as it was."""
    measured: list[Measurement] = []
    known: dict[str, Measurement] = {}
    for number, candidate in enumerate(candidates, 1):
        rows = swap.prepare(candidate) if candidate.tensors else CandidateRows()
        same = known.get(rows.digest)
        if same is not None:
            measured.append(Measurement(candidate, same.probe, same.task, rows.layers, same.name))
            continue
        with swap.swapped(rows):
            found = measure(model, f"{number}/{len(candidates)} {candidate.name}")
        known[rows.digest] = Measurement(candidate, *found, rows.layers)
        measured.append(known[rows.digest])
    return measured


def _measure(
    prober: Prober, rows: Sequence[TaskRow] | None, bar: OpenBar, model: nn.Module, label: str
) -> tuple[ProbeResult, TaskResult | None]:
    """Recall, and task quality where there are rows, of whatever the model holds at the moment."""
    with bar(label) as progress:
        recall = run_within_memory(model, prober, progress)
        return recall, None if rows is None else score_rows(model, rows)


def _task_rows(data: Any, tuned: Path, limit: int) -> list[Any] | None:
    """Rows to measure task quality on; None where recall alone is asked for."""
    if isinstance(data, str) and data == "none":
        return None
    if data is None:
        data = find_rows(tuned)
    if data is None:
        raise QKGuardError(
            "There is no data to measure task quality on: the tuned checkpoint lies in no guarded run that kept rows "
            f"of its evaluation set. Give rows held out from SFT (--data FILE.jsonl: {ROW_FORMATS}), or measure "
            "recall alone (--data none)."
        )
    return read_rows(data, limit)


def _tokenizer(folders: Folders, load: LoadOptions) -> Any:
    """The tuned checkpoint's, else the base's."""
    try:
        return load_tokenizer(folders.tuned.folder, load)
    except QKGuardError as error:
        try:
            return load_tokenizer(folders.base.folder, load)
        except QKGuardError:
            raise error from None


def _warnings(measured: Sequence[Measurement]) -> list[str]:
    methods = [m for m in measured if m.candidate.kind == "method"]
    warnings = [text for m in methods for text in fallback_warnings(m.name, m.layers)]
    if any(m.probe.not_finite for m in measured):
        warnings.append("some points gave NaN or infinite outputs; these samples count as wrong")
    return warnings


def _write(report: SweepReport, out: str | os.PathLike[str], *, rows: RowSelection, **options: Any) -> None:
    """Write the recommended checkpoint; what restoring it warns of beside is among the report's warnings then."""
    candidate = report.recommended.candidate
    extra: dict[str, Any] = {"sweep": report.summary()}
    if candidate.layers is not None and report.retrieval is not None:
        extra["retrieval"] = report.retrieval.summary()
    layers = rows.layers if candidate.layers is None else candidate.layers
    manifest = restore_checkpoint(
        report.base,
        report.tuned,
        out,
        method=candidate.method,
        extra=extra,
        **dict(candidate.options),
        **options,
        **(rows.to_json() | {"projections": candidate.tensors, "layers": layers}),
    )
    report.warnings += [text for text in manifest["warnings"] if text not in report.warnings]
