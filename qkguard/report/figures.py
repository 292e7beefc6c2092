"""Pictures of a run, as matplotlib figures without global state; `None` where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qkguard.report.heatmaps import MOST_LABELS, head_panels, recall_panels
from qkguard.report.numbers import short_length
from qkguard.report.run import DRIFT, Run

WEIGHTS = {"before": "before SFT", "raw": "raw", "restored": "Q/K restored"}
KINDS = {"q_rel": "queries", "k_rel": "keys", "routing_rel": "routing"}
LOOKS: dict[str, dict[str, Any]] = {
    "raw": {"marker": "o", "ls": "-", "ms": 4},
    "restored": {"marker": "D", "ls": ":", "ms": 6, "mfc": "none"},
}
MOST_STEPS = 400  # columns of a heatmap


def run_figures(run: Run) -> dict[str, Figure]:
    """All pictures of a run by file name, in the order of the page."""
    made = {
        "recall": recall_curves(run),
        "recall_grid": recall_grid(run),
        "drift": drift_curves(run),
        "drift_layers": drift_heatmap(run),
        "needle_mass": needle_heatmap(run),
        "retrieval": retrieval_heatmap(run),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def recall_curves(run: Run) -> Figure | None:
    """Recall over the steps, a colour per length; raw weights as lines, restored ones as diamonds."""
    probes = run.probes
    if not probes:
        return None
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axis = figure.subplots()
    lengths = sorted({length for probe in probes for length in probe.by("length")})
    for i, length in enumerate(lengths):
        for weights, look in LOOKS.items():
            points = {}
            for probe in probes:
                found = probe.by("length").get(length)
                if probe.weights == weights and found is not None:
                    points[probe.step] = found.recall
            if points:
                label = short_length(length) + (" restored" if weights == "restored" else "")
                axis.plot(*zip(*sorted(points.items()), strict=True), color=f"C{i}", label=label, **look)
    _finish(axis, "step", "needle recall")
    axis.set_ylim(-0.03, 1.03)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def recall_grid(run: Run) -> Figure | None:
    """Length x depth: recall before training, of the last raw weights and of the last restored ones."""
    shown = run.probes_with("groups")
    if not shown:
        return None
    panels = {}
    for weights, probe in shown.items():
        recall = {place: found.recall for place, found in probe.by_place().items()}
        panels[f"{WEIGHTS[weights]}: {probe.recall:.2f}"] = recall
    return recall_panels(panels)


def drift_curves(run: Run) -> Figure | None:
    """Mean drift of queries, keys and routing over the steps, the largest layer's as a thin line."""
    if not run.series(f"{DRIFT}q_rel") and not run.series(f"{DRIFT}k_rel"):
        return None
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axis = figure.subplots()
    for i, (kind, name) in enumerate(KINDS.items()):
        for key, look in ((kind, {"label": name}), (f"{kind}/max", {"lw": 0.8, "ls": "--"})):
            points = run.series(DRIFT + key)
            if points:
                marker = "o" if len(points) == 1 else None  # a line through one point is nothing
                axis.plot(*zip(*points, strict=True), color=f"C{i}", marker=marker, **look)
    _finish(axis, "step", "relative drift (dashed: largest layer)")
    axis.legend(fontsize=8, frameon=False)
    return figure


def drift_heatmap(run: Run) -> Figure | None:
    """Layer x step: relative drift of queries, keys and routing."""
    kinds = [kind for kind in KINDS if any(run.series(f"{DRIFT}{label}/{kind}") for label in run.layers)]
    if not kinds:
        return None
    rows = len(run.layers)
    figure = Figure(figsize=(1.2 + 2.9 * len(kinds), 1.5 + min(7.0, max(1.2, 0.26 * rows))), layout="constrained")
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        table = [dict(run.series(f"{DRIFT}{label}/{kind}")) for label in run.layers]
        steps = sorted({step for row in table for step in row})
        steps = steps[:: -(-len(steps) // MOST_STEPS)]
        grid = [[row.get(step, nan) for step in steps] for row in table]
        image = axis.imshow(grid, cmap="magma", aspect="auto", vmin=0, interpolation="nearest")
        ticks = range(0, len(steps), max(1, -(-len(steps) // 5)))
        axis.set_xticks(list(ticks), [str(steps[i]) for i in ticks])
        names = [label.removeprefix("layer_").replace("_", ".") for label in run.layers]
        every = max(1, -(-rows // MOST_LABELS))
        axis.set_yticks(range(0, rows, every), names[::every])
        axis.set_xlabel("step")
        axis.set_title(KINDS[kind], fontsize="medium")
        figure.colorbar(image, ax=axis, shrink=0.9)
    axes[0].set_ylabel("softmax layer")
    return figure


def needle_heatmap(run: Run) -> Figure | None:
    """Layer x head: attention of the answer on the needle, mean over lengths, before, raw and restored."""
    shown = run.probes_with("needle_mass")
    if not shown:
        return None
    layers = next(iter(shown.values())).needle_mass[0]["layers"]
    panels = {WEIGHTS[weights]: [grid["heads"] for grid in probe.needle_mass] for weights, probe in shown.items()}
    return head_panels(panels, layers, "attention on the needle")


def retrieval_heatmap(run: Run) -> Figure | None:
    """Layer x head: the scores by which `layers="retrieval"` was chosen."""
    if run.retrieval is None or not run.retrieval.scores:
        return None
    scores = run.retrieval.scores
    panels = {f"{WEIGHTS['before']} (threshold {run.retrieval.threshold:g})": [[found.heads for found in scores]]}
    return head_panels(panels, [found.layer for found in scores], "retrieval score")


def comparison_figures(runs: Mapping[str, Run]) -> dict[str, Figure]:
    """Several runs in one picture each: recall of raw (lines) and restored weights (diamonds), mean drift."""
    recall, drift = (Figure(figsize=(7.5, 3.6), layout="constrained") for _ in range(2))
    recall_axis, drift_axis = recall.subplots(), drift.subplots()
    for i, (name, run) in enumerate(runs.items()):
        for weights, look in LOOKS.items():
            points = sorted({p.step: p.recall for p in run.probes if p.weights == weights}.items())
            if points:
                label = name if weights == "raw" else f"{name}, restored"
                recall_axis.plot(*zip(*points, strict=True), color=f"C{i}", label=label, **look)
        for kind, line in (("q_rel", "-"), ("k_rel", "--")):
            points = run.series(DRIFT + kind)
            if points:
                drift_axis.plot(*zip(*points, strict=True), line, color=f"C{i}", label=f"{name}, {KINDS[kind]}")
    _finish(recall_axis, "step", "needle recall")
    recall_axis.set_ylim(-0.03, 1.03)
    _finish(drift_axis, "step", "relative drift (mean over layers)")
    out = {}
    for key, figure, axis in (("recall", recall, recall_axis), ("drift", drift, drift_axis)):
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
            out[key] = figure
    return out


def _finish(axis: Any, x: str, y: str) -> None:
    axis.set(xlabel=x, ylabel=y)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
