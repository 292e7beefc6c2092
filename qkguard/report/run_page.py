"""A run's page, `report.html`, with its pictures, and the page that compares several runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from qkguard.errors import QKGuardError
from qkguard.report.figures import KINDS, WEIGHTS, comparison_figures, run_figures
from qkguard.report.numbers import number, plural
from qkguard.report.page import Table, picture, render
from qkguard.report.run import DRIFT, Proportion, Run, load_run
from qkguard.report.sentences import describe

REPORT, FIGURES = "report.html", "figures"
OVERHEAD = "qkguard/overhead/"
CAPTIONS = {
    "recall": "Needle recall by context length. Diamonds: the restored weights at the same step.",
    "recall_grid": "Needle recall by context length and needle depth.",
    "drift": "How far queries, keys and their product (routing) have moved, relative to before training.",
    "drift_layers": "The same, layer by layer over the steps.",
    "needle_mass": "Attention from the answer's positions to the needle, by layer and head, mean over lengths.",
    "retrieval": "Attention on the needle beyond chance, of answer or question, on samples answered rightly.",
}


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` and `figures/*.png` of a guarded run, from its files alone.

    Args:
        folder: the run's output_dir, or the `_qkguard` folder in it.

    Returns:
        The path of the page.

    Raises:
        QKGuardError: the folder holds no guarded run.
    """
    run = load_run(Path(folder))
    target = run.folder / FIGURES
    target.mkdir(exist_ok=True)
    pictures = [picture(figure, CAPTIONS[name], target / f"{name}.png") for name, figure in run_figures(run).items()]
    page = render(
        "run",
        f"qkguard: {run.name}",
        facts=_facts(run),
        sentences=describe(run),
        verdict=run.verdict,
        weighed=_verdict_table(run),
        recall=_recall_table(run),
        pictures=pictures,
        layers=_layer_table(run),
        attention=_attention_table(run),
        written=_written(run),
        last_restored=run.restored_folders[-1] if run.restored_folders else None,
        cost=_cost_table(run),
    )
    out = run.folder / REPORT
    out.write_text(page, encoding="utf-8")
    return out


def write_comparison(folders: Sequence[str | os.PathLike[str]], out: Path) -> Path:
    """Write one page that compares several runs; they are named by their folders.

    Raises:
        QKGuardError: one of the folders holds no guarded run, or is given twice.
    """
    runs: dict[str, Run] = {}
    for folder in folders:
        run = load_run(Path(folder))
        if any(run.folder.resolve() == other.folder.resolve() for other in runs.values()):
            raise QKGuardError(f"{folder} is given twice; give different runs to compare")
        runs[str(folder) if run.name in runs else run.name] = run
    captions = {"recall": "Needle recall.", "drift": "Mean relative drift."}
    page = render(
        "comparison",
        f"qkguard: {plural(len(runs), 'run')}",
        runs=_comparison_table(runs),
        pictures=[picture(figure, captions[name]) for name, figure in comparison_figures(runs).items()],
        told={name: describe(run) for name, run in runs.items()},
    )
    out.write_text(page, encoding="utf-8")
    return out


def _comparison_table(runs: dict[str, Run]) -> Table:
    rows = []
    for name, run in runs.items():
        probes = [run.probe_of(weights) for weights in WEIGHTS]
        recalls = [f"{probe.recall:.3f}" if probe else "-" for probe in probes]
        drifts = [number(run.last_value(DRIFT + kind), digits=4) for kind in KINDS]
        rows.append([name, *recalls, str(max((row["step"] for row in run.rows), default=0)), *drifts])
    return Table(["run", *WEIGHTS.values(), "steps", *KINDS.values()], rows)


def _facts(run: Run) -> list[tuple[str, str]]:
    """The few numbers that stand large at the top."""
    out = []
    for weights, name in WEIGHTS.items():
        probe = run.probe_of(weights)
        if probe is not None:
            out.append((f"recall, {name}", f"{probe.recall:.2f}"))
    for kind, name in KINDS.items():
        drift = run.last_value(DRIFT + kind)
        if drift is not None:
            out.append((f"{name} moved", f"{drift:.3f}"))
    return out


def _recall_table(run: Run) -> Table | None:
    """Recall by length, a column for each of the probed weights."""
    shown = run.probes_with("groups")
    if not shown:
        return None
    by_length = {weights: probe.by("length") for weights, probe in shown.items()}
    lengths = sorted({length for found in by_length.values() for length in found})
    rows = [[f"{n:,} tokens", *(_with_interval(found.get(n)) for found in by_length.values())] for n in lengths]
    rows.append(["all", *(_with_interval(probe.total) for probe in shown.values())])
    head = ["needle recall (95%)", *(f"{WEIGHTS[weights]}, step {probe.step}" for weights, probe in shown.items())]
    return Table(head, rows, marked=len(rows) - 1)


def _with_interval(found: Proportion | None) -> str:
    if found is None:
        return "-"
    low, high = found.interval
    return f"{found.recall:.2f}  ({low:.2f} to {high:.2f})"


def _verdict_table(run: Run) -> Table | None:
    """What the verdict was measured on: recall and loss of every point, and their differences from raw."""
    if run.verdict is None:
        return None
    points = [point for point in run.verdict["points"] if point["kind"] != "base"]
    has_loss = any(point["task"] for point in points)
    head = ["", "recall (95%)", "against raw (95%)", *(["loss (95%)", "against raw (95%)"] if has_loss else [])]
    rows = []
    for point in points:
        itself = point["kind"] == "raw"
        row = [point["name"], _spread(point["recall"], ".2f"), "" if itself else _spread(point["gain"], "+.2f")]
        if point["task"]:
            loss, change = (_negated(point["task"][key]) for key in ("quality", "change"))  # quality is minus the loss
            row += [_spread(loss, ".3f"), "" if itself else _spread(change, "+.3f")]
        rows.append(row)
    names = [point["name"] for point in points]
    return Table(head, rows, marked=names.index(run.verdict["recommended"]))


def _spread(found: Mapping[str, float | None], form: str) -> str:
    """A value with its interval; "-" where it is not a number."""
    numbers = [found[key] for key in ("value", "low", "high")]
    if None in numbers:
        return "-"
    value, low, high = (format(number + 0.0, form) for number in numbers if number is not None)  # + 0.0: no "-0.00"
    return f"{value}  ({low} to {high})"


def _negated(found: Mapping[str, float | None]) -> dict[str, float | None]:
    pairs = (("value", "value"), ("low", "high"), ("high", "low"))
    negated: dict[str, float | None] = {}
    for mine, other in pairs:
        number = found[other]
        negated[mine] = None if number is None else -number
    return negated


def _layer_table(run: Run) -> Table | None:
    rows = [
        [label.replace("_", " "), *(number(run.last_value(f"{DRIFT}{label}/{kind}"), digits=4) for kind in KINDS)]
        for label in run.layers
    ]
    return Table(["", *KINDS.values()], rows) if rows else None


def _attention_table(run: Run) -> Table | None:
    """Where the answer's positions look, layer by layer: before, raw and restored in one cell, means over lengths."""
    shown = run.probes_with("attention")
    if not shown:
        return None
    layers = next(iter(shown.values())).attention[0]["layers"]
    rows = []
    for i, layer in enumerate(layers):
        row = [f"layer {layer}"]
        for kind, form in (("needle_mass", ".3f"), ("local_mass", ".3f"), ("distance", ",.0f")):
            means = [fmean(found[kind][i] for found in probe.attention) for probe in shown.values()]
            row.append(" / ".join(format(mean, form) for mean in means))
        rows.append(row)
    weights = " / ".join(WEIGHTS[name] for name in shown)
    return Table([weights, "on the needle", "on recent tokens", "distance (tokens)"], rows)


def _written(run: Run) -> list[str]:
    """Which restored folders there are, and what the last one is."""
    if run.manifest is None:
        return []
    method = run.manifest["method"]["name"]
    if method == "raw":
        what = "It is the raw model under another name, which the verdict recommends."
    elif run.manifest.get("kind") == "adapter":
        what = f"Method {method}: an adapter that leaves queries and keys to the base model."
    else:
        layers = plural(len(run.manifest["layers"]), "softmax-attention layer")
        what = f"Method {method}: {layers}, {plural(len(run.manifest['tensors']), 'tensor')}."
    count, last = len(run.restored_folders), run.restored_folders[-1]
    where = f"1 restored folder: {last}" if count == 1 else f"{count} restored folders, the last one {last}"
    return [where, what, *run.manifest["warnings"]]


def _cost_table(run: Run) -> Table | None:
    """How often the guard measured or wrote, and how long that took."""
    rows = []
    for key in run.names(OVERHEAD):
        seconds = run.values(key)
        name = key.removeprefix(OVERHEAD).removesuffix("_seconds").replace("_", ", ")
        rows.append([name, str(len(seconds)), f"{sum(seconds):.1f} s", f"{max(seconds):.2f} s"])
    return Table(["", "times", "in total", "longest"], rows) if rows else None
