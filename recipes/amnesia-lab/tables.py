"""The results as tables: read from results/*.json, averaged over bases, written into README.md between its markers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

TASKS = {"single_2": "S2", "multikey_1": "MK1", "multikey_2": "MK2"}
NAMES = {"pre": "before SFT", "raw": "after SFT (raw)", "restore": "**Q and K restored**"}
CONTROLS = ("Q only", "K only", "V only", "O only")
WAYS = {
    "full": "SFT, 2e-3",
    "mild": "SFT, 1e-3",
    "gentle": "SFT, 3e-4",
    "tag": "SFT, `tag` style, 1e-3",
    "frozen": "SFT with Q/K frozen, 2e-3",
    "windows": "SFT on longer windows, 2e-3",
    "lora": "LoRA, 2e-3",
}
# Kind of base: what it is called, and the run that stands for it
BASES = {
    "one": ("LLLALL", "full"),
    "two": ("LLALLA", "full"),
    "rotary": ("LLLALL, rotary", "full"),
    "large": ("LLLALL, 68 M, SFT at 3e-4", "gentle"),
}
# Predictors of the study that need no diagnosis
TRIVIAL = ("learning rate", "steps", "repeated 4-grams")
Results = dict[str, dict[str, dict[int, dict]]]
Value = Callable[[Mapping], float | None]


def read(folder: Path) -> Results:
    """Results by kind of base ("one", "two", ...), run ("full", ...) and seed."""
    found: Results = {}
    for path in folder.glob("*.json"):
        if name := re.fullmatch(r"([a-z]+)-(\d+)-(.+)", path.stem):
            base, seed, run = name.groups()
            found.setdefault(base, {}).setdefault(run, {})[int(seed)] = json.loads(path.read_text())
    return {
        base: {run: dict(sorted(s.items())) for run, s in sorted(runs.items())} for base, runs in sorted(found.items())
    }


def share(point: Mapping, task: str, **only: float) -> float | None:
    """Recall of a point on a task, over all lengths and depths or those given; None where it was not measured."""
    rows = [dict(zip(("task", "length", "depth", "count", "hits"), row, strict=False)) for row in point["recall"]]
    rows = [r for r in rows if r["task"] == task and all(r[k] == v for k, v in only.items())]
    return sum(r["hits"] for r in rows) / sum(r["count"] for r in rows) if rows else None


def over_lengths(point: Mapping, task: str, lengths: Sequence[int]) -> float | None:
    """Mean of the recall at each length."""
    shares = [share(point, task, length=n) for n in lengths]
    known = [s for s in shares if s is not None]
    return mean(known) if len(known) == len(lengths) else None


def strongest(point: Mapping, length: int, column: int) -> float:
    """Attention mass (column 3 needle, 4 nearest tokens) of the head that puts most on the needle at this length."""
    rows = [row for row in point["attention"] if row[0] == length]
    return max(rows, key=lambda row: row[3])[column]


def common_lengths(results: Iterable[Mapping]) -> list[int]:
    """The lengths that all of them were measured at."""
    each = [{row[1] for row in r["points"]["pre"]["recall"]} for r in results]
    return sorted(set.intersection(*each))


def cell(values: Iterable[float | None], digits: int = 2) -> str:
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


def skill(point: Mapping) -> float:
    return point["skill"]


def over_seeds(results: Iterable[Mapping], name: str, value: Value) -> list[float | None]:
    """`value` of the point of that name in every result that has it."""
    return [value(r["points"][name]) for r in results if name in r["points"]]


def able(results: Iterable[Mapping], task: str) -> list[Mapping]:
    """Those whose base could do the task before SFT, at its shortest length more often than not."""
    shortest = ((r, share(r["points"]["pre"], task, length=min(common_lengths([r])))) for r in results)
    return [r for r, found in shortest if found is not None and found > 0.5]


def measured(results: Sequence[Mapping]) -> list[str]:
    """The points that every seed has."""
    return [name for name in results[0]["points"] if all(name in r["points"] for r in results)]


def restored(results: Results, kind: str) -> list[Mapping]:
    """Of a kind of base, the results of the run that stands for it, where it has come as far as restoring."""
    return [r for r in results.get(kind, {}).get(BASES[kind][1], {}).values() if "restore" in r["points"]]


def gridded(results: Iterable[Mapping]) -> list[Mapping]:
    """Those with every restore, not only the first and the controls."""
    return [r for r in results if "procrustes" in r["points"]]


def lengths_table(results: Sequence[Mapping]) -> str:
    """Recall by task and length before SFT, after it, and with projections restored."""
    columns, known = common_lengths(results), measured(results)
    names = [name for name in (*NAMES, *CONTROLS) if name in known]
    rows = []
    for task, short in TASKS.items():
        have = able(results, task)
        rows += [[short, NAMES.get(name, name), *length_cells(have, name, task, columns)] for name in names]
    return table(["", "", *map(tokens, columns)], rows)


def length_cells(results: Iterable[Mapping], name: str, task: str, lengths: Sequence[int]) -> list[str]:
    """Recall of a point on a task at each of these lengths."""
    return [cell(over_seeds(results, name, lambda p, n=n: share(p, task, length=n))) for n in lengths]


def points_table(results: Sequence[Mapping]) -> str:
    """Every point: recall on each task over all lengths, and skill."""
    columns = common_lengths(results)
    rows = []
    for name in measured(results):
        rows.append([NAMES.get(name, name), *task_cells(results, name, columns)])
    return table(["over all lengths", *TASKS.values(), "skill"], rows)


def task_cells(results: Sequence[Mapping], name: str, lengths: Sequence[int]) -> list[str]:
    """Recall of a point on each task over these lengths, and its skill."""
    cells = [cell(over_seeds(able(results, t), name, lambda p, t=t: over_lengths(p, t, lengths))) for t in TASKS]
    return [*cells, cell(over_seeds(results, name, skill))]


def bases_table(results: Results) -> str:
    """Every base by itself: before SFT, raw and restored."""
    rows = []
    for kind, (label, _) in BASES.items():
        for result in restored(results, kind):
            columns = common_lengths([result])
            row = [f"{label}, seed {result['base']['seed']}"]
            for value in (*(lambda p, t=t, c=columns: over_lengths(p, t, c) for t in TASKS), skill):
                found = [value(result["points"][name]) for name in ("pre", "raw", "restore")]
                row.append(" / ".join(f"{v:.2f}" for v in found if v is not None))
            rows.append(row)
    return table(["before SFT / raw / restored", *TASKS.values(), "skill"], rows)


def ways_table(runs: Mapping[str, Mapping[int, Mapping]]) -> str:
    """Raw and restored recall of every way to fine-tune, over all lengths; means over the bases each was made of."""
    rows = []
    for way, label in WAYS.items():
        results = list(runs.get(way, {}).values())
        results = [r for r in results if "restore" in r["points"]] or results  # the same bases in both rows
        for name, extra in (("raw", ""), ("restore", ", Q and K restored")):
            if any(name in r["points"] for r in results):
                row = [label + extra, str(len(results)), *task_cells(results, name, common_lengths(results))]
                rows.append([*row, drift(results) if name == "raw" else ""])
    return table(["over all lengths", "bases", *TASKS.values(), "skill", "drift Q / K"], rows)


def drift(results: Sequence[Mapping], digits: int = 2) -> str:
    """How far queries and keys moved, mean over layers."""
    return " / ".join(cell((mean(r["drift"][f"{x}_proj"]) for r in results), digits) for x in "qk")


def verdict_of(result: Mapping) -> str:
    """What the guard's rule recommends of a run, with recall raw and so: "restore, .83 to .96"."""
    found = result["verdict"]
    recall = {point["name"]: point["recall"]["value"] for point in found["points"]}
    chosen = found["recommended"]
    text = f"{recall['raw']:.2f}"
    return f"{chosen}, {text}" if chosen == "raw" else f"{chosen}, {text} to {recall[chosen]:.2f}"


def verdicts_table(results: Results) -> str:
    """What is recommended of every run: a row per base, a column per way of SFT."""
    ways = [
        way for way in WAYS if any("verdict" in r for runs in results.values() for r in runs.get(way, {}).values())
    ]
    rows = []
    for kind, (label, _) in BASES.items():
        runs = results.get(kind, {})
        for seed in sorted({seed for of_way in runs.values() for seed in of_way}):
            found = [runs.get(way, {}).get(seed, {}) for way in ways]
            cells = [verdict_of(result) if "verdict" in result else "" for result in found]
            if any(cells):
                rows.append([f"{label.split(', SFT')[0]}, seed {seed}", *cells])
    return table(["", *(WAYS[way] for way in ways)], rows)


def recommended_table(results: Results) -> str:
    """How often each point is recommended, by kind of base and way of SFT; what that costs in skill."""
    names = list(dict.fromkeys(("raw", *(p["name"] for r in with_verdict(results) for p in r["verdict"]["points"]))))
    names.remove("base")
    rows = []
    for kind, (label, _) in BASES.items():
        for way, said in WAYS.items():
            found = [r for r in results.get(kind, {}).get(way, {}).values() if "verdict" in r]
            if not found:
                continue
            chosen = [r["verdict"]["recommended"] for r in found]
            counts = [str(chosen.count(name)) if name in chosen else "" for name in names]
            skills = [cell(r["points"][name]["skill"] for r in found) for name in ("raw", "restore")]
            taken = cell(r["points"][name]["skill"] for r, name in zip(found, chosen, strict=True))
            rows.append([f"{label.split(', SFT')[0]}; {said}", str(len(found)), *counts, *skills, taken])
    return table(["", "runs", *names, "skill raw", "skill restored", "skill as recommended"], rows)


def with_verdict(results: Results) -> list[Mapping]:
    """All results that have a verdict."""
    every = (r for runs in results.values() for of_way in runs.values() for r in of_way.values())
    return [r for r in every if "verdict" in r]


def depth_table(results: Sequence[Mapping]) -> str:
    """Recall by depth of the needle, all lengths together."""
    depths = sorted({row[2] for r in results for row in r["points"]["raw"]["recall"]})
    rows = []
    for task in ("single_2", "multikey_1"):
        for name in ("pre", "raw", "restore"):
            have = able(results, task)
            values = (over_seeds(have, name, lambda p, t=task, d=d: share(p, t, depth=d)) for d in depths)
            rows.append([TASKS[task], NAMES[name], *map(cell, values)])
    return table(["", "", *(f"depth {depth:g}" for depth in depths)], rows)


def attention_table(results: Sequence[Mapping]) -> str:
    """Needle and local attention mass of the head that finds the needle."""
    columns = common_lengths(results)
    rows = []
    for name in ("pre", "raw", "restore"):
        for column, what in ((3, "on the needle"), (4, "on the nearest 128")):
            values = (over_seeds(results, name, lambda p, n=n, c=column: strongest(p, n, c)) for n in columns)
            rows.append([f"{NAMES[name]}, {what}", *map(cell, values)])
    return table(["strongest head", *map(tokens, columns)], rows)


def control_rows(results: Sequence[Mapping], names: Sequence[str]) -> Iterator[tuple[str, str, Sequence[Mapping]]]:
    """Label, point and results of every row of the control's tables: before SFT once, the others at each rate."""
    yield NAMES["pre"], "pre", results
    for rate in sorted({r["sft"]["lr"] for r in results}):
        same = [r for r in results if r["sft"]["lr"] == rate]
        known = measured(same)
        for name in names:
            if name != "pre" and name in known:
                yield f"{NAMES.get(name, name)}, {rate_name(rate)}", name, same


def rate_name(rate: float) -> str:
    """2e-05 as "2e-5", every digit kept."""
    digits, power = f"{rate:e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def control_lengths_table(results: Sequence[Mapping]) -> str:
    """The control's recall by task and length."""
    columns = common_lengths(results)
    rows = []
    for task, short in TASKS.items():
        for label, name, same in control_rows(results, ("raw", "restore")):
            rows.append([short, label, *length_cells(same, name, task, columns)])
    return table(["", "", *map(tokens, columns)], rows)


def control_table(results: Sequence[Mapping]) -> str:
    """Every point of the control: recall on each task, log-probability of the answers, skill, drift."""
    columns = common_lengths(results)
    rows = []
    for label, name, same in control_rows(results, list(dict.fromkeys(n for r in results for n in r["points"]))):
        shares = (over_seeds(same, name, lambda p, t=t: over_lengths(p, t, columns)) for t in TASKS)
        values = (*shares, over_seeds(same, name, answer_logprob), over_seeds(same, name, skill))
        row = [label, *map(cell, values), cell(over_seeds(same, name, needle_mass), 3)]
        rows.append([*row, drift(same, 3) if name == "raw" else ""])
    head = ["over all lengths", *TASKS.values(), "log-probability", "skill", "on the needle", "drift Q / K"]
    return table(head, rows)


def needle_mass(point: Mapping) -> float | None:
    """Attention mass on the needle, mean over heads and lengths; None where attention was not watched."""
    return mean(row[1] for row in point["attention_mean"]) if "attention_mean" in point else None


def answer_logprob(point: Mapping) -> float:
    """Mean over all samples of the mean log-probability of the answer's tokens, in nats."""
    return sum(row[3] * row[5] for row in point["recall"]) / sum(row[3] for row in point["recall"])


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


def study_table(found: Mapping[str, Mapping]) -> str:
    """The predictors of the loss of recall, the strongest first."""
    rows = []
    for name, row in sorted(found.items(), key=lambda item: -abs(item[1]["correlation"])):
        best = max(TRIVIAL, key=lambda other: abs(found[other]["correlation"]))
        lead = row["leads"][best]
        ahead = "" if row["trivial"] else with_interval(lead["value"], lead["interval"])
        shown = [with_interval(row[k], row[f"{p}interval"]) for k, p in (("correlation", ""), ("within", "within_"))]
        rows.append([f"*{name}*" if row["trivial"] else name, *shown, ahead, "yes" if row["earned"] else ""])
    head = ["predictor (*trivial*)", "rank correlation", "at one rate and length"]
    return table([*head, "lead on the best trivial", "earned"], rows)


def with_interval(value: float, bounds: Sequence[float]) -> str:
    return f"{value:+.2f} ({bounds[0]:+.2f} to {bounds[1]:+.2f})"


def study_losses_table(rows: Sequence[Mapping]) -> str:
    """Recall lost by kind of data and training, means over bases."""
    trainings = sorted({row["training"] for row in rows}, key=lambda name: (float(name.split(":")[0]), name))
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    body = []
    for kind in kinds:
        of = ([r["lost"] for r in rows if (r["data"], r["training"]) == (kind, name)] for name in trainings)
        body.append([f"`{kind}`", *map(cell, of)])
    return table(["recall lost", *(" x ".join(name.split(":")) for name in trainings)], body)


def all_tables(folder: Path) -> dict[str, str]:
    """Every table by the name of its markers; only those that there are results for."""
    results = read(folder)
    out = {}
    if full := restored(results, "one"):
        tables = (lengths_table, depth_table, attention_table)
        out = {f.__name__.removesuffix("_table"): f(full) for f in tables}
        out |= {"bases": bases_table(results), "ways": ways_table(results["one"])}
    if with_verdict(results):
        out |= {"recommended": recommended_table(results), "verdicts": verdicts_table(results)}
    for kind in filter(results.__contains__, BASES):
        if grid := gridded(restored(results, kind)):
            out[f"points-{kind}"] = points_table(grid)
    if large := results.get("large"):
        out["ways-large"] = ways_table(large)
    if control := [json.loads(path.read_text()) for path in sorted(folder.glob("control/*.json"))]:
        out |= {"control-lengths": control_lengths_table(control), "control": control_table(control)}
    if (folder / "study/study.json").exists():
        study = json.loads((folder / "study/study.json").read_text())
        out["study"] = study_table(study["predictors"]["lost"])
        out["study-losses"] = study_losses_table(study["rows"])
    if (folder / "exploration.jsonl").exists():
        out["explored"] = explored_table(folder / "exploration.jsonl")
    return out


def write_into(text: str, tables: Mapping[str, str]) -> str:
    """The text with the tables between `<!-- name -->` and `<!-- /name -->`."""
    for name, rows in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, times = re.subn(pattern, lambda m, rows=rows: f"{m[1]}{rows}\n{m[2]}", text, flags=re.DOTALL)
        if times != 1:
            raise SystemExit(f"the text has {times} places <!-- {name} --> where one is needed")
    return text
