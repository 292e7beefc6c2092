"""What `qkguard diagnose` shows: sentences, a table, two curves, and a page with all of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qkguard.diagnosis.curves import Estimate
from qkguard.diagnosis.measure import Measured
from qkguard.offline.diagnose import NO_FORECAST, Diagnosis
from qkguard.report.numbers import number
from qkguard.report.page import Table, picture, render, setting_lines

COLOURS = {"data": "C3", "prose": "C0"}
MOST_BINS = 60


def sentences(found: Diagnosis) -> list[str]:
    """The measurements in words, and why there is no forecast."""
    far = found.settings["far"]
    said = [
        _compared(found, "w_corr", "The data resembles itself over {} tokens"),
        _compared(found, "w_grad", "The gradient on attention logits falls off over {} tokens"),
        _compared(found, "far_share", f"Keys more than {far} tokens back give {{}} of the gradient of W_Q and W_K"),
    ]
    if math.isnan(found.data.w_corr.value):
        said[0] = "How far the data resembles itself takes more than one row."
    elif found.data.w_corr.value == 0:
        said[0] = "The data resembles itself no more than the same tokens in random order would."
    retrieval = found.retrieval
    if retrieval is not None:
        said.append(
            f"The gradient of W_Q and the retrieval scores (recall {retrieval.recall:.0%}) overlap by "
            f"{retrieval.overlap:.2f} over heads, its far part by {retrieval.overlap_far:.2f}; spread evenly, a "
            f"gradient would by {retrieval.even:.2f}."
        )
    return [*said, NO_FORECAST]


def _compared(found: Diagnosis, name: str, text: str) -> str:
    prose = "" if found.prose is None else f"; prose: {_with_interval(name, getattr(found.prose, name))}"
    return f"{text.format(_with_interval(name, getattr(found.data, name)))}{prose}."


def _with_interval(name: str, found: Estimate) -> str:
    shown = _percent if name.startswith("far_share") else number
    if found.low is None or found.high is None:
        return shown(found.value)
    return f"{shown(found.value)} ({shown(found.low)} to {shown(found.high)})"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def layer_table(found: Diagnosis) -> Table:
    """A row per softmax layer, then all of them: W_grad and far shares with 95% intervals, data beside prose."""
    texts = [text for text in (found.data, found.prose) if text is not None]
    head = ["layer"]
    for text in texts:
        head += [f"{text.name}: W_grad", "far, W_Q", "far, W_K"]
    rows = []
    for i, layer in enumerate(found.data.layers):
        row = [str(layer.layer)]
        for text in texts:
            here = text.layers[i]
            row += [_with_interval(name, getattr(here, name)) for name in ("w_grad", "far_share_q", "far_share_k")]
        rows.append(row)
    both = [[_with_interval("w_grad", t.w_grad), _with_interval("far_share", t.far_share), ""] for t in texts]
    rows.append(["all", *(cell for cells in both for cell in cells)])
    return Table(head, rows, marked=len(rows) - 1)


def heads_table(found: Diagnosis) -> Table | None:
    """The heads that look up needles best, and their share of the gradient of W_Q."""
    if found.retrieval is None:
        return None
    rows = [
        [str(h["layer"]), str(h["head"]), f"{h['score']:.2f}", f"{h['gradient']:.1%}"] for h in found.retrieval.heads
    ]
    return Table(["layer", "head", "retrieval score", "share of the gradient"], rows)


def curves_figure(found: Diagnosis) -> Figure:
    """Self-similarity and gradient over the distance between two tokens, data beside prose."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for text in (found.data, found.prose):
        if text is None:
            continue
        look: dict[str, Any] = {"color": COLOURS[text.name], "label": text.name}
        left.plot(*_binned(text.similarity, 1), **look)
        right.plot(*_binned(text.gradient, 0), **look)
        _mark(left, text, text.w_corr)
        _mark(right, text, text.w_grad)
    left.axhline(0, color="0.6", lw=0.8)
    left.set(ylabel="excess self-similarity of embeddings")
    right.set(ylabel="gradient on attention logits", yscale="log")
    for axis in (left, right):
        axis.set(xlabel="distance in tokens", xscale="symlog")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    return figure


def _mark(axis: Any, text: Measured, length: Estimate) -> None:
    """A line at the decay length, its interval in a lighter band."""
    colour = COLOURS[text.name]
    axis.axvline(length.value, color=colour, ls=":", lw=1)
    if length.low is not None and length.high is not None:
        axis.axvspan(length.low, length.high, color=colour, alpha=0.12, lw=0)


def _binned(values: np.ndarray, first: int) -> tuple[list[float], list[float]]:
    """(distances, means) in bins that widen with distance; distances without a pair are left out."""
    distance = np.arange(first, first + len(values))
    known = values != 0
    edges = np.unique(np.geomspace(1, len(values) + 1, MOST_BINS).astype(int)) - 1
    xs, ys = [], []
    for lo, hi in _pairs(edges):
        inside = known[lo:hi]
        if inside.any():
            xs.append(float(distance[lo:hi][inside].mean()))
            ys.append(float(values[lo:hi][inside].mean()))
    return xs, ys


def _pairs(edges: np.ndarray) -> Iterator[tuple[int, int]]:
    return zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)


def html_page(found: Diagnosis) -> str:
    """A page that needs nothing else: sentences, curves, layers, heads, settings."""
    caption = "Left: self-similarity of the text. Right: gradient by distance. Dotted: decay lengths, with intervals."
    return render(
        "diagnose",
        "Diagnosis before training",
        sentences=sentences(found),
        warnings=found.warnings,
        curves=picture(curves_figure(found), caption),
        layers=layer_table(found),
        heads=heads_table(found),
        settings=setting_lines({"model": found.model, **found.settings}),
    )
