"""What the demo shows: a table of three models, the recall curve as a line of text, and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qkguard.demo.scores import Score
from qkguard.report.run import DRIFT, Run

NAMES = {"before": "before SFT", "raw": "after SFT (raw)", "qk_restored": "restored"}
_COLORS = {"before": "#7f8c8d", "raw": "#c0392b", "qk_restored": "#2471a3"}
_DRIFTS = {"q_rel": ("queries", "-"), "k_rel": ("keys", "--"), "routing_rel": ("routing", ":")}


def label(name: str, score: Score) -> str:
    """A model's name, and for the restored one the point of the verdict that it is."""
    return f"{NAMES[name]} ({score.point})" if name == "qk_restored" else NAMES[name]


def table(scores: Mapping[str, Score]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: recall by length, and the share of chains of thought that are right, of the three models."""
    models = list(scores.values())
    rows = [
        [f"needle recall, {length:,} tokens", *(f"{model.recall[length]:.2f}" for model in models)]
        for length in models[0].recall
    ]
    rows.append(["chains of thought right", *(f"{model.cot_accuracy:.2f}" for model in models)])
    return ["", *(label(name, score) for name, score in scores.items())], rows


def curve(run: Run) -> str:
    """Recall over the training, in one line."""
    found = [f"{probe.recall:.2f} at step {probe.step}" for probe in run.probes if probe.weights == "raw"]
    return f"recall while it trained: {', '.join(found)}"


def picture(path: Path, run: Run, scores: Mapping[str, Score]) -> None:
    """A PNG: drift over the steps, recall over the steps with the restored model's at the end, recall by length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(12, 3.7), layout="constrained")
    FigureCanvasAgg(figure)
    drift, training, lengths = figure.subplots(1, 3)
    for name, (what, style) in _DRIFTS.items():
        points = run.series(f"{DRIFT}{name}")
        drift.plot(*zip(*points, strict=True), style, color="#34495e", label=what)
    drift.set(xlabel="step", ylabel="|W − W₀| / |W₀|", title="drift during SFT")
    raw = [(probe.step, probe.recall) for probe in run.probes if probe.weights == "raw"]
    training.plot(*zip(*raw, strict=True), "o-", color=_COLORS["raw"], label="as it trains")
    restored = scores["qk_restored"]
    training.plot([raw[-1][0]], [restored.mean_recall], "*", ms=13, color=_COLORS["qk_restored"], label="restored")
    training.set(xlabel="step", ylabel="needle recall", ylim=(-0.03, 1.05), title="recall during SFT")
    for name, score in scores.items():
        text = f"{label(name, score)}, chains right {score.cot_accuracy:.2f}"
        lengths.plot(range(len(score.recall)), score.recall.values(), "o-", color=_COLORS[name], label=text)
        lengths.set_xticks(range(len(score.recall)), [f"{length:,}" for length in score.recall])
    lengths.set(xlabel="context length in tokens", ylim=(-0.03, 1.05), title="recall by length")
    for axes, place in ((drift, "center right"), (training, "center right"), (lengths, "center")):
        axes.legend(fontsize=7.5, loc=place)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
