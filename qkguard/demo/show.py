"""What the demo shows: a table, a sentence that reads it, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qkguard.demo.scores import Scores

NAMES = {"before": "before SFT", "raw": "after SFT (raw)", "qk_restored": "QK-restored"}
_COLORS = {"before": "#7f8c8d", "raw": "#c0392b", "qk_restored": "#2471a3"}
_NOISE = 0.03  # smaller changes are called no change


def table(scores: Mapping[str, Scores]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: recall by length, CoT accuracy and attention on the needle of the three models."""
    models = [scores[name] for name in NAMES]
    rows = [
        [f"needle recall, {length:,} tokens", *(f"{m.recall[length]:.2f}" for m in models)]
        for length in models[0].recall
    ]
    rows.append(["CoT accuracy", *(f"{m.cot_accuracy:.2f}" for m in models)])
    rows.append(["attention on the needle, best head", *(f"{m.needle_mass:.2f}" for m in models)])
    return ["", *NAMES.values()], rows


def reading(scores: Mapping[str, Scores]) -> str:
    """The table in words, whatever it says."""
    before, raw, restored = (scores[name] for name in NAMES)
    lost, regained = before.mean_recall - raw.mean_recall, restored.mean_recall - raw.mean_recall
    gained, given = raw.cot_accuracy - before.cot_accuracy, raw.cot_accuracy - restored.cot_accuracy
    learnt = f"SFT took CoT accuracy from {before.cot_accuracy:.2f} to {raw.cot_accuracy:.2f}"
    if lost < _NOISE:
        recall = f"and cost no recall here ({before.mean_recall:.2f} to {raw.mean_recall:.2f})"
    else:
        recall = f"and mean recall from {before.mean_recall:.2f} to {raw.mean_recall:.2f}"
    if abs(regained) < _NOISE:
        back = f"Restoring queries and keys left recall at {restored.mean_recall:.2f}"
    elif regained > 0:
        share = f", {min(regained / lost, 1):.0%} of what was lost," if lost >= _NOISE else ""
        back = f"Restoring queries and keys brought recall back to {restored.mean_recall:.2f}{share}"
    else:
        back = f"Restoring queries and keys lowered recall to {restored.mean_recall:.2f}"
    if abs(given) < _NOISE or gained <= 0:
        price = f"with CoT accuracy at {restored.cot_accuracy:.2f}"
    else:
        price = f"and left CoT accuracy at {restored.cot_accuracy:.2f}"
    return f"{learnt} {recall}. {back} {price}."


def picture(path: Path, rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Scores], title: str) -> None:
    """A PNG: drift of every softmax layer over the steps, beside recall by length of the three models.

    Args:
        rows: of the run's `metrics.jsonl`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    drift, recall = figure.subplots(1, 2)
    figure.suptitle(title)
    layers = sorted({int(k.split("layer_")[1].split("/")[0]) for row in rows for k in row if "/layer_" in k})
    for layer in layers:
        for kind, style in (("q_rel", "-"), ("k_rel", "--"), ("routing_rel", ":")):
            key = f"qkguard/drift/layer_{layer}/{kind}"
            points = [(row["step"], row[key]) for row in rows if key in row]
            label = f"layer {layer} {kind.removesuffix('_rel').replace('q', 'Q').replace('k', 'K')}"
            drift.plot(*zip(*points, strict=True), style, color=f"C{layers.index(layer)}", label=label)
    drift.set(xlabel="step", ylabel="relative drift |W − W₀| / |W₀|", title="drift of queries, keys and routing")
    drift.legend(fontsize=8)
    for name, label in NAMES.items():
        lengths, shares = zip(*scores[name].recall.items(), strict=True)
        label += f" (CoT {scores[name].cot_accuracy:.2f})"
        recall.plot(range(len(lengths)), shares, "o-", color=_COLORS[name], label=label)
        recall.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    recall.set(xlabel="context length in tokens", ylabel="needle recall", ylim=(-0.03, 1.03), title="recall")
    recall.legend(fontsize=8)
    for axes in (drift, recall):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
