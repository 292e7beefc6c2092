"""Heatmaps of recall and of attention, as matplotlib figures without global state."""

from __future__ import annotations

import io
from collections.abc import Mapping
from math import nan

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qkguard.probe.results import AttentionMass, ProbeResult


def recall_heatmap(results: Mapping[str, ProbeResult]) -> Figure:
    """Recall by context length and needle depth, one panel per model, in the usual needle-in-a-haystack colours."""
    figure = Figure(figsize=(1.2 + 3.6 * len(results), 3.4), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    image = None
    for axis, (name, result) in zip(axes, results.items(), strict=True):
        lengths = sorted({c.length for c in result.cells})
        depths = sorted({c.depth for c in result.cells})
        cells = result.by("depth", "length")
        grid = [[cells[d, n].recall if (d, n) in cells else nan for n in lengths] for d in depths]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [short_length(n) for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        axis.set_xlabel("context length (tokens)")
        axis.set_title(f"{name}\nrecall {result.recall:.1%}", fontsize="medium")
        if grid and len(grid) * len(lengths) <= 80:
            for y, row in enumerate(grid):
                for x, value in enumerate(row):
                    if value == value:
                        ink = "black" if 0.15 < value < 0.85 else "white"
                        axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize="small", color=ink)
    axes[0].set_ylabel("needle depth")
    if image is not None:
        figure.colorbar(image, ax=axes, label="recall", shrink=0.9)
    return figure


def attention_heatmap(mass: AttentionMass) -> Figure:
    """Layer x head: attention of the answer positions on needle and most recent tokens, mean over lengths."""
    figure = Figure(figsize=(8, 1.2 + 0.28 * max(4, len(mass.layers))), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, kind, title in zip(axes, ("needle", "local"), ("needle", f"last {mass.window} tokens"), strict=True):
        grids = list(getattr(mass, kind).values())
        heads = max(len(row) for row in grids[0])
        mean = [
            [sum(g[y][x] for g in grids) / len(grids) if x < len(grids[0][y]) else nan for x in range(heads)]
            for y in range(len(mass.layers))
        ]
        image = axis.imshow(mean, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_yticks(range(len(mass.layers)), [str(n) for n in mass.layers])
        axis.set_xlabel("head")
        axis.set_title(f"attention on the {title}", fontsize="medium")
    axes[0].set_ylabel("softmax-attention layer")
    figure.colorbar(image, ax=axes, label="probability", shrink=0.9)
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def short_length(tokens: int) -> str:
    """1536 -> "1.5K", 131072 -> "128K"."""
    return f"{tokens / 1024:.3g}K" if tokens >= 1024 else str(tokens)
