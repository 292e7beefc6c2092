"""The study's results: which number predicts the loss of recall, and whether any has earned a forecast.

    python recipes/amnesia-lab/study_results.py --results runs/study

reads one JSON file per base, as study_base.py writes them, and writes study.json, study.md and study.png beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lab
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tables import TRIVIAL, share, study_table

DRAWS = 2000
BOUNDS = (0.025, 0.975)
RULE = (
    "a number earns a forecast if the size of its rank correlation with the loss of recall exceeds that of each "
    "trivial predictor, with a 95% interval of the difference (over bases) above zero, and its sign is the same in "
    "both halves of the bases"
)
Row = dict[str, float | str | None]


def read(folder: Path) -> dict[str, dict]:
    """Results by base."""
    names = sorted(path for path in folder.glob("*.json") if path.stem != "study")
    return {path.stem: json.loads(path.read_text()) for path in names}


def able(before: Sequence) -> list[str]:
    """The tasks that a base can do at the shortest length, more often than not."""
    point = {"recall": before}
    shortest = min(row[1] for row in before)
    return [task for task in sorted({row[0] for row in before}) if (share(point, task, length=shortest) or 0) > 0.5]


def lost(before: Sequence, after: Sequence, tasks: Sequence[str]) -> tuple[float, float]:
    """(recall lost, answer log-probability lost in nats), means over these tasks, their lengths and depths."""
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b[0] in tasks]
    recall = [(b[4] / b[3]) - (a[4] / a[3]) for b, a in pairs]
    return float(np.mean(recall)), float(np.mean([b[5] - a[5] for b, a in pairs]))


def points(results: Mapping[str, dict]) -> list[Row]:
    """A row per training: base, data, predictors, loss of recall. Bases that can do no task are left out."""
    rows: list[Row] = []
    for base, found in results.items():
        tasks = able(found["before"])
        if not tasks:
            continue
        for kind, data in found["data"].items():
            for name, training in data["trainings"].items():
                lr, steps = name.split(":")
                fall, nats = lost(found["before"], training["recall"], tasks)
                row = {"base": base, "data": kind, "training": name, "lost": fall, "nats": nats}
                row |= {"learning rate": float(lr), "steps": float(steps), "repeated 4-grams": data["repeated"]}
                rows.append(row | data["numbers"])
    return rows


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0 on; equal values share the mean of theirs."""
    values = np.asarray(values, dtype=float)
    below = (values[:, None] > values).sum(1)
    return below + ((values[:, None] == values).sum(1) - 1) / 2


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's; 0 where one of both does not vary."""
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size > 0 else 0.0


def overall(rows: Sequence[Row], name: str, outcome: str) -> float:
    """Over all trainings."""
    known = [row for row in rows if row[name] is not None]
    return correlation([row[name] for row in known], [row[outcome] for row in known]) if known else 0.0


def within(rows: Sequence[Row], name: str, outcome: str) -> float:
    """Mean over the pairs of rate and steps, neither of which can then explain anything."""
    kinds = sorted({row["training"] for row in rows})
    return float(np.mean([overall([r for r in rows if r["training"] == kind], name, outcome) for kind in kinds]))


def draws(rows: Sequence[Row], of: Callable[[Sequence[Row]], np.ndarray], count: int, seed: int = 0) -> np.ndarray:
    """`of` on bootstrap samples of whole bases: trainings of one base are not independent."""
    by_base: dict[str, list[Row]] = {}
    for row in rows:
        by_base.setdefault(row["base"], []).append(row)
    bases, rng = list(by_base.values()), np.random.default_rng(seed)
    picks = rng.integers(len(bases), size=(count, len(bases)))
    return np.array([of([row for i in pick for row in bases[i]]) for pick in picks])


def interval(values: np.ndarray) -> list[float]:
    return [round(float(v), 4) for v in np.quantile(values, BOUNDS)]


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The trainings of every other base, and of the rest."""
    first = set(sorted({row["base"] for row in rows})[::2])
    return [r for r in rows if r["base"] in first], [r for r in rows if r["base"] not in first]


def summarise(rows: Sequence[Row], outcome: str = "lost", count: int = DRAWS) -> dict[str, dict]:
    """Every predictor's rank correlations with intervals, its lead on the trivial ones, and whether it is earned."""
    left_out = ("base", "data", "training", "lost", "nats")
    names = [name for name in rows[0] if name not in left_out]

    def all_correlations(some: Sequence[Row]) -> np.ndarray:
        return np.array([[of(some, name, outcome) for name in names] for of in (overall, within)])

    values, drawn = all_correlations(rows), draws(rows, all_correlations, count)
    out = {}
    for i, name in enumerate(names):
        leads = {}
        for other in TRIVIAL:
            j = names.index(other)
            lead = np.abs(drawn[:, 0, i]) - np.abs(drawn[:, 0, j])
            leads[other] = {"value": float(abs(values[0, i]) - abs(values[0, j])), "interval": interval(lead)}
        signs = {bool(overall(half, name, outcome) > 0) for half in halves(rows)}
        found = {"correlation": float(values[0, i]), "interval": interval(drawn[:, 0, i])}
        found |= {"within": float(values[1, i]), "within_interval": interval(drawn[:, 1, i])}
        found |= {"trivial": name in TRIVIAL, "leads": leads, "same_sign": len(signs) == 1}
        out[name] = found | {"earned": is_earned(found)}
    return out


def is_earned(found: Mapping) -> bool:
    """`RULE`."""
    ahead = all(lead["interval"][0] > 0 for lead in found["leads"].values())
    return not found["trivial"] and ahead and found["same_sign"]


def words(found: Mapping[str, Mapping], bases: int, trainings: int) -> str:
    """What the study says of a forecast."""
    earned = [name for name, row in found.items() if row["earned"]]
    over = f"over {trainings} trainings of {bases} bases"
    if not earned:
        return f"No number has earned a forecast {over}: none predicts the loss of recall better than trivial ones do."
    ways = {name: "more" if found[name]["correlation"] > 0 else "less" for name in earned}
    return f"Earned {over}: {', '.join(f'{name} (the {way}, the more is lost)' for name, way in ways.items())}."


def picture(rows: Sequence[Row], found: Mapping[str, Mapping], path: Path) -> None:
    """Loss of recall over every number, a colour per kind of data, a size per learning rate."""
    names = [name for name, row in found.items() if not row["trivial"]]
    columns = 4
    figure = Figure(figsize=(3.4 * columns, 3.0 * -(-len(names) // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-len(names) // columns), columns, squeeze=False).flatten()
    kinds = sorted({row["data"] for row in rows})
    for axis, name in zip(axes, names, strict=False):
        for i, kind in enumerate(kinds):
            some = [row for row in rows if row["data"] == kind and row[name] is not None]
            place = [row[name] for row in some], [row["lost"] for row in some]
            sizes = [4 + 6000 * row["learning rate"] for row in some]
            axis.scatter(*place, s=sizes, color=f"C{i}", alpha=0.6, label=kind)
        axis.set(xlabel=name, title=f"{found[name]['correlation']:+.2f}")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("recall lost")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def evaluate(folder: Path, count: int = DRAWS) -> dict:
    """Everything of a folder of results, written into it."""
    rows = points(read(folder))
    bases = len({row["base"] for row in rows})
    if bases < 2:
        raise SystemExit(f"{folder} has the results of {bases} bases that recall anything; two are the least")
    found = {outcome: summarise(rows, outcome, count) for outcome in ("lost", "nats")}
    said = words(found["lost"], bases, len(rows))
    summary = {"rule": RULE, "words": said, "bases": bases, "trainings": len(rows), "predictors": found, "rows": rows}
    lab.write_json(folder / "study.json", summary)
    lab.write(folder / "study.md", f"{said} The rule: {RULE}.\n\n{study_table(found['lost'])}\n")
    picture(rows, found["lost"], folder / "study.png")
    return summary


def main() -> None:
    parser = lab.parser(__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=DRAWS, help="bootstrap draws")
    args = parser.parse_args()
    summary = evaluate(args.results, args.draws)
    print(summary["words"])
    print(study_table(summary["predictors"]["lost"]))


if __name__ == "__main__":
    main()
