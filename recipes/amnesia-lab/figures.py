"""Stage 4, tables and figures from the results.

python recipes/amnesia-lab/figures.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tables import HERE, S, all_tables, lengths, measured, over_seeds, read, share, strongest, tokens, write_into

LINES = {
    "pre": ("before SFT", "#7f8c8d"),
    "raw": ("after SFT", "#c0392b"),
    "restore": ("Q and K restored", "#2471a3"),
    "K only": ("K alone", "#76b7e0"),
    "Q only": ("Q alone", "#1abc9c"),
    "V only": ("V alone", "#e67e22"),
    "O only": ("O alone", "#f1c40f"),
}


def figure(columns: int):
    made = Figure(figsize=(5.2 * columns, 3.9), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return made, axes


def curve(ax, xs, per_seed, label: str, color: str) -> None:
    """Mean over seeds, with every seed as a thin line."""
    for values in zip(*per_seed, strict=True):
        ax.plot(range(len(xs)), values, color=color, alpha=0.25, linewidth=0.8)
    ax.plot(range(len(xs)), [mean(v) for v in per_seed], "o-", color=color, label=label)
    ax.set_xticks(range(len(xs)), [tokens(x) for x in xs])
    ax.set(xlabel="context length in tokens", ylim=(-0.03, 1.03))


def recall(results, path: Path) -> None:
    """Recall by length: before, after, restored; and the controls."""
    made, (left, right) = figure(2)
    xs = lengths(results, S)
    for name, (label, color) in LINES.items():
        if name not in measured(results):
            continue
        per_seed = [over_seeds(results, name, lambda p, n=n: share(p, S, length=n)) for n in xs]
        for ax in [left] * (name in ("pre", "raw", "restore")) + [right] * (name != "pre"):
            curve(ax, xs, per_seed, label, color)
    left.set(ylabel="needle recall (S2)", title="CoT-SFT and QK-Restore")
    right.set(title="single projections restored")
    for ax in (left, right):
        ax.legend(fontsize=8)
    made.savefig(path, dpi=110)


def tradeoff(results, path: Path) -> None:
    """Recall at the long lengths against skill, every point."""
    made, (ax,) = figure(1)
    long = [n for n in lengths(results, S) if n >= 4096] or lengths(results, S)
    for name in measured(results):
        x = mean(over_seeds(results, name, lambda p: p["skill"]))
        y = mean(mean(over_seeds(results, name, lambda p, n=n: share(p, S, length=n))) for n in long)
        known = LINES.get(name)
        ax.plot(x, y, "o", color=known[1] if known else "#555555", markersize=8 if known else 5)
        ax.annotate(known[0] if known else name, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    ax.set(xlabel="skill (final answers right)", ylabel=f"S2 recall, {tokens(long[0])} and longer")
    made.savefig(path, dpi=110)


def attention(results, path: Path) -> None:
    made, axes = figure(2)
    xs = lengths(results, S)
    for ax, column, title in zip(axes, (3, 4), ("on the needle", "on the nearest 128 tokens"), strict=True):
        for name in ("pre", "raw", "restore"):
            per_seed = [over_seeds(results, name, lambda p, n=n, c=column: strongest(p, n, c)) for n in xs]
            curve(ax, xs, per_seed, *LINES[name])
        ax.set(title=f"attention of the strongest head, {title}")
        ax.legend(fontsize=8)
    made.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "figures")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    full = read(args.results)["one"]["full"]
    recall(full, args.out / "recall.png")
    tradeoff(full, args.out / "tradeoff.png")
    attention(full, args.out / "attention.png")
    args.readme.write_text(write_into(args.readme.read_text(), all_tables(args.results)))


if __name__ == "__main__":
    main()
