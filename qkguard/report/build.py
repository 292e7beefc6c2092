"""`report.html` and its pictures, from a run's folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qkguard.errors import QKGuardError
from qkguard.report import page
from qkguard.report.figures import NAMES, compared, figures
from qkguard.report.run import DRIFT, Run, load_run
from qkguard.report.words import tell

REPORT, FIGURES = "report.html", "figures"
CAPTIONS = {
    "recall": "Needle recall by context length; diamonds: the same weights with queries and keys restored.",
    "recall_grid": "Needle recall by context length and depth of the needle.",
    "drift": "How far queries, keys and their product (routing) have moved, relative to before training.",
    "drift_layers": "The same, layer by layer over the steps.",
    "needle_mass": "Attention of the answer's positions on the needle, by layer and head, mean over lengths.",
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
    pictures = figures(run)
    target = run.folder / FIGURES
    target.mkdir(exist_ok=True)
    parts = [_facts(run), page.heading("What happened"), page.bullets(tell(run)), _recall_table(run)]
    for name, figure in pictures.items():
        parts.append(page.picture(figure, CAPTIONS[name], target / f"{name}.png"))
    parts += [_layer_table(run), _written(run), _cost(run)]
    out = run.folder / REPORT
    out.write_text(page.page(f"qkguard: {run.name}", *parts), encoding="utf-8")
    return out


def write_comparison(folders: Sequence[str | os.PathLike[str]], out: Path) -> Path:
    """One page that compares several runs; they are named by their folders.

    Raises:
        QKGuardError: one of the folders holds no guarded run.
    """
    runs: dict[str, Run] = {}
    for folder in folders:
        run = load_run(Path(folder))
        if any(run.folder.resolve() == other.folder.resolve() for other in runs.values()):
            raise QKGuardError(f"{folder} is given twice; give different runs to compare")
        runs[run.name if run.name not in runs else str(folder)] = run
    head = ["run", *NAMES.values(), "steps", "queries", "keys", "routing"]
    rows = []
    for name, run in runs.items():
        probes = [run.last(which) for which in NAMES]
        recalls = [f"{probe.recall:.3f}" if probe else "-" for probe in probes]
        drifts = [_number(run.final(DRIFT + kind)) for kind in ("q_rel", "k_rel", "routing_rel")]
        rows.append([name, *recalls, str(run.rows[-1]["step"] if run.rows else 0), *drifts])
    parts = [page.table(head, rows)]
    for key, figure in compared(runs).items():
        parts.append(page.picture(figure, {"recall": "Needle recall.", "drift": "Mean relative drift."}[key]))
    for name, run in runs.items():
        parts += [page.heading(name), page.bullets(tell(run))]
    out.write_text(page.page(f"qkguard: {len(runs)} runs", *parts), encoding="utf-8")
    return out


def _facts(run: Run) -> str:
    values = [
        (f"recall, {NAMES[which]}", f"{probe.recall:.2f}") for which in NAMES if (probe := run.last(which)) is not None
    ]
    drifts = (("queries moved", "q_rel"), ("keys moved", "k_rel"), ("routing moved", "routing_rel"))
    values += [(name, f"{value:.3f}") for name, kind in drifts if (value := run.final(DRIFT + kind)) is not None]
    return page.facts(values)


def _recall_table(run: Run) -> str:
    shown = {name: probe for name in NAMES if (probe := run.last(name)) is not None and probe.cells}
    if not shown:
        return ""
    lengths = sorted({n for probe in shown.values() for n in probe.by("length")})
    rows = []
    for length in lengths:
        cells = [f"{length:,} tokens"]
        for probe in shown.values():
            share = probe.by("length").get(length)
            cells.append("-" if share is None else "{:.2f}  ({:.2f} to {:.2f})".format(share.recall, *share.interval))
        rows.append(cells)
    totals = ["{:.2f}  ({:.2f} to {:.2f})".format(p.total.recall, *p.total.interval) for p in shown.values()]
    rows.append(["all", *totals])
    head = ["needle recall (95%)", *(f"{NAMES[name]}, step {probe.step}" for name, probe in shown.items())]
    return page.table(head, rows, marked=[len(rows) - 1])


def _layer_table(run: Run) -> str:
    kinds = {"q_rel": "queries", "k_rel": "keys", "routing_rel": "routing"}
    rows = [
        [label.replace("_", " "), *(_number(run.final(f"{DRIFT}{label}/{kind}")) for kind in kinds)]
        for label in run.layers
    ]
    if not rows:
        return ""
    return page.heading("Drift at the end, layer by layer") + page.table(["", *kinds.values()], rows)


def _written(run: Run) -> str:
    if not run.restored_folders or run.manifest is None:
        return page.heading("What was written") + "<p>No restored checkpoint yet.</p>"
    last, method = run.restored_folders[-1], run.manifest["method"]["name"]
    if run.manifest.get("kind") == "adapter":
        what = f"method {method}: an adapter that leaves queries and keys to the base"
    else:
        layers, tensors = len(run.manifest["layers"]), len(run.manifest["tensors"])
        what = f"method {method}, {layers} softmax-attention layers, {tensors} tensors"
    said = [
        f"{len(run.restored_folders)} restored folder(s), the last one {last}",
        what,
        *run.manifest["warnings"],
    ]
    return page.heading("What was written") + page.bullets(said) + page.code(f"qkguard verify --full {last}")


def _cost(run: Run) -> str:
    sums: dict[str, list[float]] = {}
    for row in run.rows:
        for key, value in row.items():
            if key.startswith("qkguard/overhead/"):
                name = key.rpartition("/")[2].removesuffix("_seconds").replace("_", ", ")
                sums.setdefault(name, []).append(value)
    rows = [[name, str(len(values)), f"{sum(values):.1f} s", f"{max(values):.2f} s"] for name, values in sums.items()]
    return page.heading("What the guard cost") + page.table(["", "times", "in all", "longest"], rows) if rows else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
