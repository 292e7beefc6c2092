"""Stage 4, tables and figures from the results.

python recipes/amnesia-lab/figures.py [--results runs/results]
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

from lab import HERE, parser
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from study_results import picture
from tables import (
    TASKS,
    able,
    all_tables,
    common_lengths,
    gridded,
    measured,
    over_lengths,
    over_seeds,
    read,
    restored,
    share,
    skill,
    strongest,
    tokens,
    write_into,
)

LINES = {
    "pre": ("before SFT", "#7f8c8d"),
    "raw": ("after SFT", "#c0392b"),
    "restore": ("Q and K restored", "#2471a3"),
    "K only": ("K alone", "#76b7e0"),
    "Q only": ("Q alone", "#1abc9c"),
    "V only": ("V alone", "#e67e22"),
    "O only": ("O alone", "#f1c40f"),
}
MARKERS = {  # by the start of a point's name
    "interpolate alpha 0.5 aligned": "v",
    "qk-pro": "s",
    "interpolate": "^",
    "procrustes": "D",
    "Q+K+V+O": "P",
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
    """Mean over bases, with every base as a thin line."""
    for values in zip(*per_seed, strict=True):
        ax.plot(range(len(xs)), values, color=color, alpha=0.2, linewidth=0.8)
    ax.plot(range(len(xs)), [mean(v) for v in per_seed], "o-", color=color, label=label)
    ax.set_xticks(range(len(xs)), [tokens(x) for x in xs])
    ax.set(xlabel="context length in tokens", ylim=(-0.03, 1.03))


def recall(results, path: Path) -> None:
    """Recall by length before, after, restored and with one projection restored; a panel per task."""
    made, axes = figure(len(TASKS))
    xs = common_lengths(results)
    for ax, (task, short) in zip(axes, TASKS.items(), strict=True):
        have = able(results, task)
        for name, (label, color) in LINES.items():
            if have and name in measured(have):
                per_seed = [over_seeds(have, name, lambda p, t=task, n=n: share(p, t, length=n)) for n in xs]
                curve(ax, xs, per_seed, label, color)
        ax.set(title=f"{short}, {len(have)} bases")
    axes[0].set(ylabel="needle recall")
    axes[0].legend(fontsize=8, loc="lower left")
    made.savefig(path, dpi=90)


def tradeoff(results, path: Path) -> None:
    """Recall on all tasks and lengths against skill, every point."""
    made, (ax,) = figure(1)
    made.set_size_inches(8, 4.6)
    xs = common_lengths(results)
    for name in measured(results):
        x = mean(v for v in over_seeds(results, name, skill) if v is not None)
        by_task = [over_seeds(able(results, t), name, lambda p, t=t: over_lengths(p, t, xs)) for t in TASKS]
        shares = [[v for v in values if v is not None] for values in by_task]
        if not any(shares):
            continue
        label, color = LINES.get(name, (name, None))
        marker = next((m for start, m in MARKERS.items() if name.startswith(start)), "o")
        # Hollow and larger where another point may lie beneath
        size, face = (8, color) if color else (11, "none")
        ax.plot(
            x,
            mean(mean(values) for values in shares if values),
            marker,
            color=color,
            markerfacecolor=face,
            markersize=size,
            label=label,
        )
    ax.set(xlabel="skill (final answers right)", ylabel="recall, all tasks and lengths")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    made.savefig(path, dpi=110)


def attention(results, path: Path) -> None:
    made, axes = figure(2)
    xs = common_lengths(results)
    for ax, column, title in zip(axes, (3, 4), ("on the needle", "on the nearest 128 tokens"), strict=True):
        for name in ("pre", "raw", "restore"):
            per_seed = [over_seeds(results, name, lambda p, n=n, c=column: strongest(p, n, c)) for n in xs]
            curve(ax, xs, per_seed, *LINES[name])
        ax.set(title=f"attention of the strongest head, {title}")
        ax.legend(fontsize=8)
    made.savefig(path, dpi=110)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON files")
    options.add_argument("--out", type=Path, help="folder of figures and tables.md, <results>/figures unless given")
    args = options.parse_args()
    own = args.results.resolve() == (HERE / "results").resolve()
    out = args.out or (HERE if own else args.results) / "figures"
    full = restored(read(args.results), "one")
    if not full:
        raise SystemExit(f"{args.results} holds no one-SEED-full.json with a restored point; evaluate.py writes them")
    out.mkdir(parents=True, exist_ok=True)
    recall(full, out / "recall.png")
    tradeoff(gridded(full) or full, out / "tradeoff.png")
    attention(full, out / "attention.png")
    if (file := args.results / "study/study.json").exists():
        study = json.loads(file.read_text())
        picture(study["rows"], study["predictors"]["lost"], out / "study.png")
    tables = all_tables(args.results)
    if own:
        (HERE / "README.md").write_text(write_into((HERE / "README.md").read_text(), tables))
    else:  # the lab's README stays its own
        (out / "tables.md").write_text("\n\n".join(f"## {name}\n\n{rows}" for name, rows in tables.items()) + "\n")


if __name__ == "__main__":
    main()
