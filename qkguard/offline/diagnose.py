"""`diagnose`: what a training's data would ask of a model's attention, before the training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qkguard.checkpoint.weights import resolve_folder
from qkguard.diagnosis.curves import Estimate, difference
from qkguard.diagnosis.measure import Measured, TextRow, measure
from qkguard.errors import QKGuardError, first_line
from qkguard.layout import find_attention
from qkguard.offline.diagnosed_rows import check_text, spread, text_windows, training_rows
from qkguard.offline.models import LoadOptions, OpenBar, load_model, load_tokenizer, no_bar
from qkguard.offline.task_rows import read_rows
from qkguard.probe.prober import Prober
from qkguard.probe.retrieval import LayerScore, choose_layers
from qkguard.probe.settings import ProbeSettings, default_lengths
from qkguard.probe.statistics import at_floor
from qkguard.probe.words import floor_clause

VERSION = 1
NUMBERS = ("w_corr", "w_grad", "far_share")
SHOWN_HEADS = 8
NO_OVERLAP = "no overlap with retrieving heads"
NO_FORECAST = (
    "These are measurements, not a forecast: in a study of 288 trainings none of them predicted the loss of recall "
    "better than the learning rate, the number of steps and the share of repeated phrases do."
)
"""What is said in place of a forecast. The study is in recipes/amnesia-lab."""


@dataclass(frozen=True)
class Retrieval:
    """The heads that find needles in the model as it is, and how much of the gradient of W_Q falls on them.

    Attributes:
        recall: share of needles found.
        overlap: of two distributions over heads, retrieval scores and the norm of the gradient: the sum of the smaller
            of both, from 0 (other heads) to 1 (the same). `overlap_far`: of the gradient from far keys.
        even: the overlap of a gradient that is the same for all heads.
        heads: those with the highest scores: layer, head, score (`probe.retrieval`), gradient (share of all heads').
    """

    recall: float
    overlap: float
    overlap_far: float
    even: float
    heads: list[dict[str, Any]]


@dataclass
class Diagnosis:
    """What was measured. `prose` is None without a text to compare with; `warnings` are sentences for the user."""

    model: str
    data: Measured
    prose: Measured | None
    retrieval: Retrieval | None
    settings: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def differences(self) -> dict[str, Estimate]:
        """Data less prose, by number; empty without prose."""
        if self.prose is None:
            return {}
        return {name: difference(getattr(self.data, name), getattr(self.prose, name)) for name in NUMBERS}

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {
            "version": VERSION,
            "model": self.model,
            "data": self.data.to_json(),
            "prose": None if self.prose is None else self.prose.to_json(),
            "data_less_prose": {name: found.to_json() for name, found in self.differences().items()},
            "retrieval": None if self.retrieval is None else vars(self.retrieval),
            "forecast": None,
            "why_no_forecast": NO_FORECAST,
            "settings": self.settings,
            "warnings": self.warnings,
        }


def diagnose(
    model: str | os.PathLike[str] | nn.Module,
    data: Any,
    *,
    against: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    rows: int = 32,
    max_length: int = 2048,
    far: int = 128,
    completion_only: bool = True,
    assistant_only: bool = False,
    heads: bool = True,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    bar: OpenBar = no_bar,
) -> Diagnosis:
    """Measure how far training text resembles itself, and how far back it makes a model's attention look.

        found = diagnose("base", "cot.jsonl", against="prose.txt")
        print(found.data.w_corr, found.data.w_grad, found.data.far_share)

    A forward and a backward pass per row; no optimizer, and neither weights nor random states change.

    Args:
        model: a folder, a hub id, or a loaded model (with `tokenizer`).
        data: what would be trained on: JSON lines (`choice.task.ROW_FORMATS`), a .txt or .md file, or rows.
        against: ordinary text to compare with (.txt, .md, or JSON lines), cut into rows as long as the data's.
        tokenizer: instead of the one in the model's folder.
        rows: at most so many rows, from everywhere in the data.
        max_length: tokens; longer rows are cut, as in training.
        far: keys more than this many tokens back count as far.
        completion_only: of a prompt and its completion the loss is the completion's alone, TRL's default.
        assistant_only: of messages the loss is that of the last turn alone; TRL's default is all of them.
        heads: also probe which heads find needles, and how much of the gradient falls on them.
        seed: of the intervals and of the probe.
        dtype: "auto" is bfloat16 on an accelerator and float32 on a CPU.
        device: "auto" (all accelerators), "cpu", "cuda:1", ...
        trust_remote_code: allow the checkpoint's own model code.
        bar: opens a progress bar with a label.

    Raises:
        QKGuardError: data that cannot be read, packed rows, a model that does not load, or one whose attention cannot
            be followed.
    """
    _check(rows, max_length, far)
    load = LoadOptions(_dtype(dtype, device), device, trust_remote_code)
    folder = None if isinstance(model, nn.Module) else resolve_folder(model)
    if tokenizer is None:
        if folder is None:
            raise QKGuardError("A loaded model is diagnosed with its tokenizer; give tokenizer=.")
        tokenizer = load_tokenizer(folder, load)
    chosen, warnings = _data_rows(tokenizer, data, rows, max_length, completion_only, assistant_only)
    prose = None if against is None else _prose_rows(tokenizer, against, chosen, warnings)
    loaded = model if isinstance(model, nn.Module) else load_model(resolve_folder(model), load)
    measured = []
    for name, texts in (("data", chosen), ("prose", prose)):
        if texts is not None:
            with bar(name) as progress:
                measured.append(measure(loaded, texts, name, far=far, seed=seed, progress=progress))
    if max(len(row.ids) for row in chosen) <= far:
        warnings.append(f"no row is longer than {far} tokens, so no key is far; give a smaller far")
    retrieval = None
    if heads:
        with bar("needles") as progress:
            retrieval = find_retrieval(loaded, tokenizer, measured[0], seed, warnings, progress)
    settings = {"rows": len(chosen), "max_length": max_length, "far": far, "seed": seed, "dtype": str(_held(loaded))}
    settings |= {"completion_only": completion_only, "assistant_only": assistant_only}
    settings |= {"data": _said(data), "against": None if against is None else str(against)}
    name = type(loaded).__name__ if folder is None else str(model)
    return Diagnosis(name, measured[0], measured[1] if prose is not None else None, retrieval, settings, warnings)


def _check(rows: int, max_length: int, far: int) -> None:
    for name, value, least in (("rows", rows, 1), ("max_length", max_length, 2), ("far", far, 0)):
        if value < least:
            raise QKGuardError(f"Invalid {name}={value}: expected a whole number from {least} on.")


def _dtype(dtype: str, device: str) -> str:
    """ "auto": half of the memory on an accelerator, exact on a CPU."""
    if dtype != "auto":
        return dtype
    on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    return "float32" if on_cpu else "bfloat16"


def _held(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _said(data: Any) -> str:
    return str(data) if isinstance(data, str | os.PathLike) else "rows"


def _data_rows(
    tokenizer: Any, data: Any, count: int, max_length: int, completion_only: bool, assistant_only: bool
) -> tuple[list[TextRow], list[str]]:
    """Rows of the data, and warnings."""
    text = check_text(data)
    if text is not None:
        return text_windows(tokenizer, text, [max_length] * count, str(data))
    found = spread(read_rows(data), count)
    return training_rows(tokenizer, found, max_length, completion_only, assistant_only)


def _prose_rows(tokenizer: Any, against: Any, data: Sequence[TextRow], warnings: list[str]) -> list[TextRow]:
    """The text to compare with, in rows of the data's lengths."""
    text = check_text(against)
    if text is None:
        text = "\n\n".join(_strings(read_rows(against), against))
    rows, said = text_windows(tokenizer, text, [len(row.ids) for row in data], str(against))
    warnings += said
    return rows


def _strings(rows: Sequence[Mapping[str, Any]], name: Any) -> list[str]:
    texts = [row.get("text") for row in rows]
    if not all(isinstance(text, str) for text in texts):
        raise QKGuardError(f'{Path(name)}: text to compare with is expected as .txt, .md, or rows with "text".')
    return [str(text) for text in texts]


def find_retrieval(
    model: nn.Module, tokenizer: Any, data: Measured, seed: int, warnings: list[str], progress: Any = None
) -> Retrieval | None:
    """Probe which heads find needles, and compare with where the gradient falls; None, with a warning, where the model
    finds none or the probe cannot be made.
    """
    try:
        lengths = default_lengths(model)[:1]
        if not lengths:
            raise QKGuardError("the model has no room for contexts of 512 tokens")
        settings = ProbeSettings(lengths=lengths, depths=5, samples=1, seed=seed, questions=True)
        prober = Prober(tokenizer, settings)
        prober.find_formats(model)
        result = prober.run(model, progress=progress)
    except QKGuardError as error:
        warnings.append(f"{NO_OVERLAP}: {first_line(error)}")
        return None
    if at_floor(result.total.hits, result.total.count):
        warnings.append(f"{NO_OVERLAP}: {floor_clause(result.total.hits, result.total.count, 'the model')}")
        return None
    choice = choose_layers(result.retrieval, find_attention(model))
    found = compare_heads(data, choice.scores, result.recall)
    if found is None:
        warnings.append(f"{NO_OVERLAP}: {choice.why or 'W_Q is not made head by head'}")
    return found


def compare_heads(data: Measured, scores: Sequence[LayerScore], recall: float) -> Retrieval | None:
    """Overlap of retrieval scores with the gradient of W_Q, over the heads that have both; None where none has."""
    by_layer = {found.layer: found.heads for found in scores}
    places: list[tuple[int, int]] = []
    retrieve: list[float] = []
    everywhere: list[float] = []
    far: list[float] = []
    for measured, all_norms, far_norms in zip(data.layers, data.all_heads, data.far_heads, strict=True):
        heads = by_layer.get(measured.layer, ())
        if not heads or len(heads) != len(all_norms):
            continue
        places += [(measured.layer, head) for head in range(len(heads))]
        retrieve += [max(0.0, score) for score in heads]
        everywhere += all_norms.tolist()
        far += far_norms.tolist()
    if not places:
        return None
    shares = [_share(values) for values in (retrieve, everywhere, far, [1.0] * len(places))]
    overlap, overlap_far, even = (float(np.minimum(shares[0], other).sum()) for other in shares[1:])
    best = np.argsort(retrieve)[::-1][:SHOWN_HEADS]
    found = []
    for i in best:
        (layer, head), gradient = places[i], float(shares[1][i])
        found.append({"layer": layer, "head": head, "score": retrieve[i], "gradient": gradient})
    return Retrieval(recall, overlap, overlap_far, even, found)


def _share(values: Sequence[float]) -> np.ndarray:
    total = float(np.sum(values))
    return np.array(values) / total if total > 0 else np.zeros(len(values))
