"""Finished checkpoints probed side by side: what `qkguard probe` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from qkguard.checkpoint.weights import resolve_folder
from qkguard.errors import QKGuardError
from qkguard.offline.configs import compare_configs, read_config
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
from qkguard.probe.generation import NEW_TOKENS, answer_prompts, generated, read_prompts
from qkguard.probe.prober import Prober
from qkguard.probe.prompt import Encoder, make_template
from qkguard.probe.results import ProbeResult
from qkguard.probe.settings import ProbeSettings, check_lengths
from qkguard.probe.statistics import at_floor
from qkguard.probe.words import floor_clause


@dataclass
class ModelReport:
    """One model's result. `warnings` are sentences for the user."""

    name: str
    result: ProbeResult
    warnings: list[str] = field(default_factory=list)


def probe_models(
    models: Sequence[str],
    settings: ProbeSettings,
    load: LoadOptions | None = None,
    *,
    new_tokens: int | None = None,
    bar: OpenBar = no_bar,
) -> list[ModelReport]:
    """Probe models one after the other on the same samples; the first sets the format in which answers are expected.

    Args:
        models: folders or hub ids. A folder without a tokenizer is probed with the first model's.
        settings: what to ask and how to run it; contexts are read in chunks only where the model's cache allows it.
        load: how the models are loaded.
        new_tokens: also let the models generate so many tokens, and compare with RULER's metric (slower).
        bar: opens a progress bar with a label.

    Raises:
        QKGuardError: a model that cannot be loaded or probed, bad settings.
    """
    load = load or LoadOptions()
    reports: list[ModelReport] = []
    first: Prober | None = None
    fallback: Any = None
    first_folder: Path | None = None
    for path in models:
        folder = resolve_folder(path)
        first_folder = first_folder or folder
        tokenizer = load_tokenizer(folder, load, fallback)
        fallback = fallback or tokenizer
        prober = Prober(tokenizer, replace(settings, chunk=None))
        model = load_model(folder, load)
        warnings = check_lengths(model, settings.lengths) + _config_differences(first_folder, folder)
        name = _name(path, [r.name for r in reports])
        with bar(name) as progress:
            if first is None:
                prober.find_formats(model)
            else:
                prober.adopt_formats(first)
            warnings += choose_chunk(model, prober, settings.chunk)
            result = run_within_memory(model, prober, progress)
        if new_tokens is not None:
            with bar(f"{name}, generating") as progress:
                result = replace(result, generated=generated(model, prober, result, new_tokens, progress))
        first = first or prober
        warnings += _warnings(settings, result, reports[0].result if reports else result)
        result = replace(result, settings=result.settings | {"model": str(path)})
        reports.append(ModelReport(name, result, [f"{name}: {text}" for text in warnings]))
        del model
        free_memory()
    return reports


def _config_differences(first: Path, folder: Path) -> list[str]:
    """What makes a model's recall incomparable with the first one's, where they are of one architecture."""
    try:
        return compare_configs(read_config(first), read_config(folder))
    except QKGuardError:  # other models altogether, or an adapter
        return []


def _warnings(settings: ProbeSettings, result: ProbeResult, first: ProbeResult) -> list[str]:
    warnings = []
    if settings.attention and result.attention is None:
        warnings.append("no attention mass: its attention does not go through transformers' AttentionInterface")
    if result.not_finite:
        warnings.append(f"the output was NaN or infinite on {result.not_finite} samples, counted as wrong")
    found = result.total
    if result is first and at_floor(found.hits, found.count):  # what the others are compared with
        warnings.append(floor_clause(found.hits, found.count, "it"))
    if result.settings["digest"] != first.settings["digest"]:
        warnings.append("its tokenizer or template differs, so its samples are not those of the first model")
    return warnings


def answer_file(
    models: Sequence[str],
    path: Path,
    mode: str = "auto",
    load: LoadOptions | None = None,
    *,
    new_tokens: int = NEW_TOKENS,
    bar: OpenBar = no_bar,
) -> dict[str, Any]:
    """RULER's metric of models on prompts from a file (`generation.read_prompts`): {model: rows}."""
    load = load or LoadOptions()
    prompts = read_prompts(path)
    answers: dict[str, Any] = {}
    fallback: Any = None
    for name in models:
        folder = resolve_folder(name)
        tokenizer = load_tokenizer(folder, load, fallback)
        fallback = fallback or tokenizer
        encoder = Encoder(tokenizer, make_template(tokenizer, mode))
        with bar(name) as progress:
            model: nn.Module = load_model(folder, load)
            answers[name] = answer_prompts(model, encoder, prompts, new_tokens, progress)
    return answers


def to_json(reports: Sequence[ModelReport]) -> dict[str, Any]:
    """One JSON object for all models; `drop` compares each with the first, where the samples are the same."""
    models = []
    for report in reports:
        entry = {"name": report.name, "warnings": report.warnings, "result": report.result.to_json()}
        drop = drop_since_first(reports, report)
        if drop is not None:
            entry["drop"] = drop
        models.append(entry)
    return {"models": models}


def drop_since_first(reports: Sequence[ModelReport], report: ModelReport) -> dict[str, float] | None:
    """Paired drop of recall since the first model; None for itself and for other samples."""
    first = reports[0].result
    if report is reports[0] or report.result.settings["digest"] != first.settings["digest"]:
        return None
    drop = report.result.drop_since(first)
    bounds = {"drop": drop.drop, "low": drop.low, "high": drop.high}
    return {**bounds, "p_value": drop.p_value, "count": drop.count}


def _name(path: str, taken: Sequence[str]) -> str:
    """The last parts of a path, as few as tell the models apart."""
    parts = Path(path).parts
    for count in range(1, len(parts) + 1):
        name = "/".join(parts[-count:])
        if name not in taken:
            return name
    return f"{path} ({len(taken) + 1})"
