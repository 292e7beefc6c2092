"""Heatmaps of recall and of attention, as matplotlib figures without global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qkguard.probe.results import AttentionMass, ProbeResult
from qkguard.report.numbers import short_length

Grid = Sequence[Sequence[float]]
MOST_LABELS = 40  # rows of a heatmap with a label each
MOST_NUMBERS = 80  # cells of a heatmap with a number each


def recall_heatmap(results: Mapping[str, ProbeResult]) -> Figure:
    """Recall by context length and needle depth, one panel per model, in the usual needle-in-a-haystack colours."""
    panels = {}
    for name, result in results.items():
        recall = {key: group.recall for key, group in result.by("depth", "length").items()}
        panels[f"{name}\nrecall {result.recall:.1%}"] = recall
    return recall_panels(panels)


def attention_heatmap(mass: AttentionMass) -> Figure:
    """Layer x head: attention of the answer positions on needle and most recent tokens, mean over lengths."""
    titles = {"needle": "attention on the needle", "local": f"attention on the last {mass.window} tokens"}
    panels = {title: list(getattr(mass, kind).values()) for kind, title in titles.items()}
    return head_panels(panels, mass.layers, "probability")


def recall_panels(panels: Mapping[str, Mapping[tuple[float, int], float]]) -> Figure:
    """Recall by (depth, length), side by side under their titles."""
    figure = Figure(figsize=(1.4 + 3.2 * len(panels), 3.3), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, recall) in zip(axes, panels.items(), strict=True):
        depths, lengths = (sorted({key[i] for key in recall}) for i in range(2))
        grid = [[recall.get((d, int(n)), nan) for n in lengths] for d in depths]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [short_length(int(n)) for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        axis.set_xlabel("context length (tokens)")
        axis.set_title(title, fontsize="medium")
        if len(depths) * len(lengths) <= MOST_NUMBERS:
            _write_numbers(axis, grid)
    axes[0].set_ylabel("needle depth")
    figure.colorbar(image, ax=axes, label="recall", shrink=0.9)
    return figure


def _write_numbers(axis: Any, grid: Grid) -> None:
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                ink = "black" if 0.15 < value < 0.85 else "white"
                axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize="small", color=ink)


def head_panels(panels: Mapping[str, Sequence[Grid]], layers: Sequence[int], label: str) -> Figure:
    """Layer x head side by side under their titles, each the mean of its grids (one per context length)."""
    height = 1.4 + min(7.0, max(1.2, 0.26 * len(layers)))
    figure = Figure(figsize=(1.2 + 3.2 * len(panels), height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    every = max(1, -(-len(layers) // MOST_LABELS))
    for axis, (title, grids) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(_mean(grids), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_yticks(range(0, len(layers), every), [str(n) for n in layers[::every]])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("head")
        axis.set_title(title, fontsize="medium")
    axes[0].set_ylabel("softmax-attention layer")
    figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    return figure


def _mean(grids: Sequence[Grid]) -> list[list[float]]:
    """Element by element; layers with fewer heads than others end in nan."""
    heads = max(len(row) for row in grids[0])
    return [
        [sum(values) / len(grids) for values in zip(*rows, strict=True)] + [nan] * (heads - len(rows[0]))
        for rows in zip(*grids, strict=True)
    ]
