"""The results as tables: read from results/*.json, averaged over seeds, written into README.md between its markers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
S, MK = "single_2", "multikey_1"
NAMES = {"pre": "before SFT", "raw": "after SFT (raw)", "restore": "**Q and K restored**"}
WAYS = {
    "full": "SFT, 2e-3",
    "mild": "SFT, 1e-3",
    "gentle": "SFT, 3e-4",
    "frozen": "SFT with Q/K frozen, 2e-3",
    "windows": "SFT on longer windows, 2e-3",
    "lora": "LoRA, 2e-3",
}
Results = dict[str, dict[str, list[dict]]]


def read(folder: Path) -> Results:
    """Results by base ("one", "two", ...) and run ("full", ...): one per seed, in the order of the seeds."""
    found: Results = {}
    for path in sorted(folder.glob("*-*-*.json")):
        base, _, run = path.stem.split("-")
        found.setdefault(base, {}).setdefault(run, []).append(json.loads(path.read_text()))
    return found


def share(point: Mapping, task: str, **only: float) -> float | None:
    """Recall of a point on a task, over all lengths and depths or those given."""
    rows = [dict(zip(("task", "length", "depth", "count", "hits"), row, strict=False)) for row in point["recall"]]
    rows = [r for r in rows if r["task"] == task and all(r[k] == v for k, v in only.items())]
    return sum(r["hits"] for r in rows) / sum(r["count"] for r in rows) if rows else None


def strongest(point: Mapping, length: int, column: int) -> float:
    """Attention mass (column 3 needle, 4 nearest tokens) of the head that puts most on the needle at this length."""
    rows = [row for row in point["attention"] if row[0] == length]
    return max(rows, key=lambda row: row[3])[column]


def lengths(results: Iterable[Mapping], task: str) -> list[int]:
    points = (p for r in results for p in r["points"].values())
    return sorted({row[1] for p in points for row in p["recall"] if row[0] == task})


def cell(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    text = f"{mean(known):.{digits}f}"
    return text if len(known) < 2 else f"{text} ± {stdev(known):.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tokens(length: int) -> str:
    return f"{length // 1024}K" if length >= 1024 else str(length)


def over_seeds(results: Sequence[Mapping], name: str, value: Callable[[Mapping], float | None]) -> list[float | None]:
    """`value` of the point of that name in every result that has it."""
    return [value(r["points"][name]) for r in results if name in r["points"]]


def measured(results: Sequence[Mapping]) -> list[str]:
    """The points that every seed has."""
    return [name for name in results[0]["points"] if all(name in r["points"] for r in results)]


def points_table(results: Sequence[Mapping]) -> str:
    """Every point of a run: recall by length, skill."""
    columns = [(task, length) for task in (S, MK) for length in lengths(results, task)]
    head = [""] + [f"{'S2' if task == S else 'MK1'} {tokens(length)}" for task, length in columns] + ["skill"]
    rows = []
    for name in measured(results):
        row = [NAMES.get(name, name)]
        row += [cell(over_seeds(results, name, lambda p, t=t, n=n: share(p, t, length=n))) for t, n in columns]
        rows.append([*row, cell(over_seeds(results, name, lambda p: p["skill"]))])
    return table(head, rows)


def ways_table(runs: Mapping[str, Sequence[Mapping]]) -> str:
    """Raw and restored recall on S2 of every way to fine-tune a base."""
    first = next(iter(runs.values()))
    columns = lengths(first, S)
    head = ["", *(f"S2 {tokens(n)}" for n in columns), "skill", "drift Q / K", "drift of routing"]
    before = [cell(over_seeds(first, "pre", lambda p, n=n: share(p, S, length=n))) for n in columns]
    rows = [["before SFT", *before, cell(over_seeds(first, "pre", lambda p: p["skill"])), "", ""]]
    for way, label in WAYS.items():
        results = runs.get(way, [])
        moved = " / ".join(cell([mean(r["drift"][f"{x}_proj"]) for r in results]) for x in "qk")
        routing = cell([mean(r["drift"]["routing"]) for r in results])
        for name, extra in (("raw", ""), ("restore", ", Q and K restored")):
            if over_seeds(results, name, lambda p: p["skill"]):
                row = [label + extra]
                row += [cell(over_seeds(results, name, lambda p, n=n: share(p, S, length=n))) for n in columns]
                row += [cell(over_seeds(results, name, lambda p: p["skill"]))]
                rows.append([*row, *((moved, routing) if name == "raw" else ("", ""))])
    return table(head, rows)


def depth_table(results: Sequence[Mapping]) -> str:
    """S2 by depth of the needle, all lengths from 4K together."""
    long = [n for n in lengths(results, S) if n >= 4096] or lengths(results, S)
    depths = sorted({row[2] for r in results for row in r["points"]["raw"]["recall"]})

    def at(depth: float) -> Callable[[Mapping], float]:
        return lambda p: mean(share(p, S, length=n, depth=depth) or 0.0 for n in long)

    rows = [
        [NAMES[name], *(cell(over_seeds(results, name, at(depth))) for depth in depths)]
        for name in ("pre", "raw", "restore")
    ]
    return table([f"S2, {tokens(long[0])} and longer", *(f"depth {depth:g}" for depth in depths)], rows)


def attention_table(results: Sequence[Mapping]) -> str:
    """Needle and local attention mass of the head that finds the needle."""
    columns = lengths(results, S)
    rows = []
    for name in ("pre", "raw", "restore"):
        for column, what in ((3, "on the needle"), (4, "on the nearest 128")):
            values = [cell(over_seeds(results, name, lambda p, n=n, c=column: strongest(p, n, c))) for n in columns]
            rows.append([f"{NAMES[name]}, {what}", *values])
    return table(["strongest head", *map(tokens, columns)], rows)


def explored_table(path: Path) -> str:
    """The first looks: one seed, a row per base and SFT setting."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    columns = rows[0]["lengths"]
    head = [
        "base",
        "SFT",
        *(f"S2 {tokens(n)}: pre, raw, restored, V only" for n in columns),
        "skill: pre, raw, restored",
    ]
    body = []
    for row in rows:
        shares = [" / ".join("-" if v is None else f"{v:.2f}" for v in values) for values in row["recall"]]
        body.append([row["base"], row["sft"], *shares, " / ".join(f"{v:.2f}" for v in row["skill"])])
    return table(head, body)


def all_tables(folder: Path) -> dict[str, str]:
    """Every table by the name of its markers; only those that there are results for."""
    results = read(folder)
    out = {}
    for base, runs in results.items():
        if "full" in runs:
            out[f"points-{base}"] = points_table(runs["full"])
        out[f"ways-{base}"] = ways_table(runs)
    if "one" in results:
        out["depth"] = depth_table(results["one"]["full"])
        out["attention"] = attention_table(results["one"]["full"])
    if (folder / "exploration.jsonl").exists():
        out["explored"] = explored_table(folder / "exploration.jsonl")
    return out


def write_into(text: str, tables: Mapping[str, str]) -> str:
    """The text with the tables between `<!-- name -->` and `<!-- /name -->`."""
    for name, rows in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, rows=rows: f"{m[1]}{rows}\n{m[2]}", text, flags=re.DOTALL)
    return text
