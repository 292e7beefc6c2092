"""RecallMonitor finished checkpoints, side by side: what `qkguard probe` does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkguard.checkpoint.weights import resolve_folder
from qkguard.errors import QKGuardError
from qkguard.probe.forward import check_chunks, input_device
from qkguard.probe.generation import NEW_TOKENS, answer_prompts, generated, read_prompts
from qkguard.probe.lengths import check_lengths
from qkguard.probe.prober import TASKS, Prober, Progress
from qkguard.probe.prompt import Encoder, make_frame
from qkguard.probe.results import ProbeResult
from qkguard.probe.undisturbed import undisturbed
from qkguard.report import page
from qkguard.report.heatmaps import attention_heatmap, recall_heatmap, short_length

CHUNK_ABOVE = 32768  # tokens: longer contexts are read in chunks of this size, where the model's cache allows it

Bar = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class ProbeSettings:
    """What to probe with, and how to load and run the models."""

    lengths: Sequence[int] = (512, 1024, 2048, 4096)
    depths: int | Sequence[float] = 5
    samples: int = 2
    tasks: Sequence[str] = TASKS
    haystack: Any = None
    seed: int = 0
    mode: str = "auto"
    attention: bool = True
    batch_tokens: int = 16384
    chunk: int | None = None
    generate: bool = False
    new_tokens: int = NEW_TOKENS
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass
class ModelReport:
    """One model's result. `warnings` are sentences for the user."""

    name: str
    result: ProbeResult
    warnings: list[str] = field(default_factory=list)


def probe_models(models: Sequence[str], settings: ProbeSettings, bar: Bar | None = None) -> list[ModelReport]:
    """Probe models one after the other on the same samples; the first sets the form in which answers are expected.

    Args:
        models: folders or hub ids. A folder without a tokenizer is probed with the first model's.
        settings: what to ask and how to run it.
        bar: called with a label, gives a context with a progress function.

    Raises:
        QKGuardError: a model that cannot be loaded or probed, bad settings.
    """
    reports: list[ModelReport] = []
    first: Prober | None = None
    fallback: Any = None
    for path in models:
        folder = resolve_folder(path)
        tokenizer = load_tokenizer(folder, settings, fallback)
        fallback = fallback or tokenizer
        prober = _prober(tokenizer, settings)
        model = load_model(folder, settings)
        warnings = check_lengths(model, settings.lengths)
        name = _name(path, [r.name for r in reports])
        with bar(name) if bar else nullcontext(lambda done, total: None) as progress:
            if first is None:
                prober.find_forms(model)
            else:
                prober.maker.forms, prober.forms_seen = dict(first.maker.forms), dict(first.forms_seen)
            warnings += choose_chunk(model, prober, settings)
            result = run_within_memory(model, prober, progress)
            if settings.generate:
                with bar(f"{name}, generating") if bar else nullcontext(lambda done, total: None) as generating:
                    told = generated(model, prober, result, new_tokens=settings.new_tokens, progress=generating)
                result = replace(result, generated=told)
        first = first or prober
        if settings.attention and result.attention is None:
            warnings.append("no attention mass: its attention does not go through transformers' AttentionInterface")
        if result.not_finite:
            warnings.append(f"the output was NaN or infinite on {result.not_finite} samples, counted as wrong")
        if reports and result.settings["digest"] != reports[0].result.settings["digest"]:
            warnings.append("its tokenizer or template differs, so its samples are not those of the first model")
        result = replace(result, settings=result.settings | {"model": str(path)})
        reports.append(ModelReport(name, result, [f"{name}: {text}" for text in warnings]))
        del model
        free_memory()
    return reports


def answer_file(models: Sequence[str], path: Path, settings: ProbeSettings, bar: Bar | None = None) -> dict[str, Any]:
    """RULER's metric of models on prompts from a file (`generation.read_prompts`): {model: rows}."""
    prompts = read_prompts(path)
    out: dict[str, Any] = {}
    fallback: Any = None
    for name in models:
        folder = resolve_folder(name)
        tokenizer = load_tokenizer(folder, settings, fallback)
        fallback = fallback or tokenizer
        encoder = Encoder(tokenizer, make_frame(tokenizer, settings.mode))
        with bar(name) if bar else nullcontext(lambda done, total: None) as progress:
            model = load_model(folder, settings)
            out[name] = answer_prompts(model, encoder, prompts, new_tokens=settings.new_tokens, progress=progress)
    return out


def load_tokenizer(path: Path, settings: ProbeSettings, fallback: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        if fallback is not None:
            return fallback
        raise QKGuardError(f"{path}: no tokenizer could be loaded: {_line(error)}") from error


def load_model(path: Path, settings: ProbeSettings) -> nn.Module:
    """The checkpoint in evaluation mode on the device asked for; "auto" spreads it over all accelerators.

    An adapter comes on top of the base model that it names.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    if settings.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise QKGuardError(f"dtype {settings.dtype!r}; expected auto, float32, bfloat16 or float16")
    spread = settings.device == "auto" and torch.accelerator.is_available()
    adapted = (path / "adapter_config.json").is_file()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            PeftConfig.from_pretrained(str(path)).base_model_name_or_path if adapted else path,
            dtype=settings.dtype,
            device_map="auto" if spread else None,
            trust_remote_code=settings.trust_remote_code,
        )
        if adapted:  # transformers loads adapters too, but leaves DoRA's magnitudes at their starting values
            model = PeftModel.from_pretrained(model, path)
        if settings.device != "auto":
            nn.Module.to(model, settings.device)
        return model.eval()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise QKGuardError(f"{path}: the model could not be loaded: {_line(error)}") from error


def choose_chunk(model: nn.Module, prober: Prober, settings: ProbeSettings) -> list[str]:
    """Let long contexts be read in chunks, if the model's cache gives the same answers that way."""
    chunk = settings.chunk if settings.chunk is not None else CHUNK_ABOVE
    if chunk <= 0 or max(settings.lengths) <= chunk:
        return []
    shortest = [c for c in prober.cells if c.length == prober.cells[0].length]
    error = 0.0
    with undisturbed(model):
        for cell in shortest[:: -(-len(shortest) // 6)]:
            sample = prober.maker.make(cell)
            ids = sample.ids[None].long().to(input_device(model))
            error = max(error, check_chunks(model, ids, max(16, cell.length // 3), sample.answer_size + 1))
    exact = next(model.parameters()).dtype == torch.float32
    if error > (0.05 if exact else 0.3):  # rounding alone moves half-precision outputs somewhat
        return [f"the model's cache does not allow reading in chunks (outputs differ by {error:.2f}); reading whole"]
    prober.chunk = chunk
    return []


def run_within_memory(model: nn.Module, prober: Prober, progress: Progress) -> ProbeResult:
    """Run a probe; where the accelerator's memory ends, again with smaller batches.

    Raises:
        QKGuardError: one sample at a time is too much.
    """
    while True:
        try:
            return prober.run(model, progress=progress)
        except torch.OutOfMemoryError as error:
            longest = max(c.length for c in prober.cells)
            if prober.batch_tokens <= longest:
                raise QKGuardError(
                    f"out of memory with one context of up to {longest} tokens; give shorter --lengths, --chunk 4096, "
                    "or --dtype bfloat16"
                ) from error
            prober.batch_tokens = max(longest, prober.batch_tokens // 2)
        free_memory()


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
    return {"drop": drop.drop, "low": drop.low, "high": drop.high, "p_value": drop.p_value}


def heatmap_png(reports: Sequence[ModelReport]) -> bytes:
    return page.themed_png(recall_heatmap({r.name: r.result for r in reports}))


def html_page(reports: Sequence[ModelReport]) -> str:
    """A page that needs nothing else: the table by task and length, heatmaps, attention, settings."""
    first = reports[0].result
    keys = sorted({key for r in reports for key in r.result.by("task", "length")})
    rows = []
    for task, length in keys:
        groups = [r.result.by("task", "length").get((task, length)) for r in reports]
        cells = ["" if g is None else _percent(g.recall, g.interval) for g in groups]
        rows.append([task, short_length(length), *cells])
    rows.append(["all", "", *(_percent(r.result.recall, r.result.total.interval) for r in reports)])
    pictures = [page.picture(recall_heatmap({r.name: r.result for r in reports}), "Recall by length and depth.")]
    for report in reports:
        if report.result.attention is not None:
            pictures.append(page.picture(attention_heatmap(report.result.attention), f"Attention: {report.name}."))
    settings = (f"{key}: {value}" for key, value in first.settings.items() if key != "model")
    return page.page(
        "Needle-in-a-haystack recall",
        page.table(["task", "length", *(r.name for r in reports)], rows, marked=[len(rows) - 1]),
        page.bullets(w for r in reports for w in r.warnings),
        *pictures,
        page.heading("Settings"),
        page.bullets(settings),
    )


def _prober(tokenizer: Any, settings: ProbeSettings) -> Prober:
    return Prober(
        tokenizer,
        lengths=settings.lengths,
        depths=settings.depths,
        samples=settings.samples,
        tasks=settings.tasks,
        haystack=settings.haystack,
        seed=settings.seed,
        mode=settings.mode,
        attention=settings.attention,
        batch_tokens=settings.batch_tokens,
    )


def free_memory() -> None:
    """Give back what models let go of, on the accelerator too."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _name(path: str, taken: Sequence[str]) -> str:
    """The last parts of a path, as few as tell the models apart."""
    parts = Path(path).parts
    for count in range(1, len(parts) + 1):
        name = "/".join(parts[-count:])
        if name not in taken:
            return name
    return f"{path} ({len(taken) + 1})"


def _percent(recall: float, interval: tuple[float, float]) -> str:
    return f"{recall:.1%} ({interval[0]:.0%} to {interval[1]:.0%})"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
