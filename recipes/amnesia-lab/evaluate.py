"""Stage 3, measuring: recall by length and depth, skill, attention and drift, before SFT, after it and restored.

    python recipes/amnesia-lab/evaluate.py --base runs/one-0 --runs runs/full-one-0:all --out results/one-0

writes results/one-0-full.json. Every restore and control is one of `qkguard sweep`'s points, swapped into the one
loaded model. Where the points that the guard compares at the end of a run are among them, so is its verdict: the same
rule on these samples, and on the loss of rows that were held out from SFT. With --wait it may be started beside the
other stages: the samples are made while they train.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby, islice
from pathlib import Path

import lab
import torch
from fast import repeat_keys_in_float32
from sft import examples
from tables import TASKS

from qkguard.choice.candidates import (
    Candidate,
    control_candidates,
    final_candidates,
    layer_candidates,
    method_candidate,
    method_candidates,
)
from qkguard.choice.task import TaskResult, TaskRow, encode_rows, score_rows
from qkguard.choice.verdict import Measurement, Verdict
from qkguard.demo.arithmetic import answer_of, problems
from qkguard.drift import head_weights, routing_drift
from qkguard.layout import find_attention
from qkguard.offline.pair import open_folders
from qkguard.offline.sweep_swap import CandidateSwap
from qkguard.probe import Prober, ProbeResult, ProbeSettings
from qkguard.training.config import QKGuardConfig

GRID = (
    "qk-pro:ridge=1/10",
    "interpolate:alpha=0.5/0.25/0.75",
    "interpolate:alpha=0.5:align",
    "procrustes",
)
LONGEST_WORK = 112  # tokens of a chain of thought
LONGEST_ROW = 2048  # tokens, as in sft.py
ROW_TOKENS = 1 << 14  # of a batch of rows
RAW = Candidate("raw", "raw")
FINAL = (RAW, *final_candidates(method_candidate("restore", {})))  # what the guard compares at the end of a run
HELD_OUT = 9000  # seed of the rows that the loss is of
POINTS = {
    "raw": "after SFT",
    "final": "and what the guard's verdict compares",
    "short": "and Q, K, V or O alone",
    "all": "and every method, layer by layer too",
}
RUNS_HELP = "what sft.py wrote and what to measure of it: " + ", ".join(f"{k} ({v})" for k, v in POINTS.items())


def points(which: str, layers: list[int]) -> list[Candidate]:
    """What to measure beside "before SFT", as `POINTS` says."""
    if which == "raw":
        return [RAW]
    chosen = list(FINAL)
    if which in ("short", "all"):
        chosen += control_candidates("q k v o")
    if which == "all":
        everything = Candidate("Q+K+V+O only", "control", ("q", "k", "v", "o"))
        chosen += [point for point in method_candidates(GRID) if point not in FINAL]
        chosen += [*(layer_candidates(layers) if len(layers) > 1 else ()), everything]
    return chosen


class Measure:
    """Recall on a fixed set of samples, skill on a fixed set of problems and the loss of rows, of any model."""

    def __init__(self, tokenizer, args) -> None:
        self.tokenizer = tokenizer
        settings = {"depths": args.depths, "seed": args.probe_seed, "batch_tokens": args.batch_tokens}
        self.probers = [
            Prober(tokenizer, ProbeSettings(lengths=args.lengths, samples=args.samples, tasks=args.tasks, **settings)),
        ]
        if args.far:  # the longest contexts: fewer samples
            far = {"lengths": args.far, "samples": max(1, args.samples // 2), "tasks": args.tasks}
            self.probers.append(Prober(tokenizer, ProbeSettings(**far, **settings)))
        # Other problems than those of the training text, which has seeds of its own
        self.chains = list(islice(problems(args.probe_seed, (4, 7)), args.problems))

    def prepare(self) -> None:
        for prober in self.probers:
            prober.prepare()

    def find_formats(self, model) -> None:
        for prober in self.probers:
            prober.find_formats(model)

    @property
    def samples(self) -> tuple:
        """The samples' keys, those of all lengths."""
        return tuple(key for prober in self.probers for key in prober.sample_keys)

    def __call__(self, model, rows: Sequence[TaskRow] = ()) -> dict:
        began = time.perf_counter()
        probes = [prober.run(model) for prober in self.probers]
        skill = self.skill(model)
        loss = {"nll": [round(v, 4) for v in score_rows(model, rows, ROW_TOKENS).nll]} if rows else {}
        return {
            "right": "".join(str(int(right)) for probe in probes for right in probe.correct),
            "recall": [row for probe in probes for row in recall_rows(probe)],
            "attention": [row for probe in probes for row in attention_rows(probe)],
            "skill": round(skill, 4),
            "problems": len(self.chains),
            "seconds": round(time.perf_counter() - began, 1),
        } | loss

    def skill(self, model) -> float:
        """Share of problems whose greedily written chain of thought, of any style, ends in the right answer."""
        right = 0
        for _, same in groupby(sorted(self.chains, key=size), key=size):  # prompts of one length: no padding
            chains = list(same)
            prompts = self.tokenizer([chain.prompt for chain in chains], return_tensors="pt").to(model.device)
            said = model.generate(**prompts, max_new_tokens=LONGEST_WORK, do_sample=False)
            for chain, ids in zip(chains, said[:, prompts.input_ids.shape[1] :], strict=True):
                right += answer_of(self.tokenizer.decode(ids, skip_special_tokens=True)) == chain.values[-1]
        return right / len(self.chains)


def size(chain) -> int:
    return len(chain.names)


def recall_rows(probe: ProbeResult) -> list[list]:
    """[task, length, depth, samples, hits, mean log-probability of the answer]."""
    groups = probe.by("task", "length", "depth").items()
    return [[*key, group.count, group.hits, round(group.answer_logprob, 4)] for key, group in groups]


def verdict(found: dict, samples: tuple, tokens: tuple[int, ...]) -> dict | None:
    """What the guard's rule says of the points measured; None where one of those that it compares is missing."""
    points = {"pre": Candidate("base", "base")} | {point.name: point for point in FINAL}
    if not points.keys() <= found["points"].keys():
        return None
    measured = []
    for name, candidate in points.items():
        point = found["points"][name]
        right = tuple(digit == "1" for digit in point["right"])
        probe = ProbeResult(samples, right, (float("nan"),) * len(right), {"digest": "these samples"})
        task = TaskResult(tuple(point["nll"]), tokens, None) if "nll" in point else None
        measured.append(Measurement(candidate, probe, task))
    return Verdict.of(measured, QKGuardConfig().tolerance, f"{len(tokens)} held-out rows").summary()


def attention_rows(probe: ProbeResult) -> list[list]:
    """[length, layer, head, mass on the needle, mass on the nearest 128 tokens]."""
    found = probe.attention
    if found is None:
        return []
    return [
        [length, layer, head, round(needle, 4), round(found.local[length][i][head], 4)]
        for length, grid in found.needle.items()
        for i, layer in enumerate(found.layers)
        for head, needle in enumerate(grid[i])
    ]


def drift(base, tuned) -> dict[str, list[float]]:
    """Relative drift of every softmax layer's projections, and of the routing matrix per head and layer."""
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    out: dict[str, list[float]] = {f"{x}_proj": [] for x in "qkvo"} | {"routing": []}
    for spec in find_attention(tuned):
        for x in "qkvo":
            name = f"{spec.module}.{x}_proj.weight"
            out[f"{x}_proj"].append(float((after[name] - before[name]).norm() / before[name].norm()))
        maps = [p for p in spec.params if p.kind == "weight"]
        now, then = (head_weights(spec, maps, {p.name: p.take(w[p.name]) for p in maps}) for w in (after, before))
        out["routing"] += routing_drift(now[0], then[0], now[1], then[1]).tolist()
    return {name: [round(v, 4) for v in values] for name, values in out.items()}


def final(run: Path) -> Path:
    """The tuned model of a run of `sft.py`, as a whole model."""
    folder = run / "_qkguard" / "final"
    there = [f for f in (folder / "merged_raw", folder / "raw") if f.exists()]
    if not there:
        raise SystemExit(f"{folder} holds no model; sft.py --out {run} makes one")
    return there[0]


def folder_and_points(text: str) -> tuple[Path, str]:
    folder, _, which = text.rpartition(":")
    if not folder or which not in POINTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not FOLDER:POINTS with one of {', '.join(POINTS)}")
    return Path(folder), which


def options() -> argparse.ArgumentParser:
    parser = lab.parser(__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument(
        "--runs", type=folder_and_points, nargs="+", required=True, metavar="FOLDER:POINTS", help=RUNS_HELP
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON files are named <out>-<folder, less -BASE>.json")
    parser.add_argument(
        "--wait", type=float, default=0, help="seconds to wait for models that are still in the making"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--far", type=int, nargs="*", default=[16384], help="lengths with half of the samples")
    parser.add_argument("--tasks", nargs="+", default=["single_2", "multikey_1", "multikey_2"])
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4, help="per task, length and depth")
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128, help="held out from SFT, for the loss")
    parser.add_argument("--probe-seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=1 << 16, help="of a batch; less on a CPU")
    return parser


class Evaluation:
    """One base and what was made of it."""

    def __init__(self, args) -> None:
        self.args, self.began = args, time.time()
        self.there(args.base / "settings.json")
        self.measure = Measure(lab.load_tokenizer(args.base), args)
        self.measure.prepare()
        self.there(args.base / "pretrain.json")
        self.pretrained = lab.base(args.base)
        base = lab.load(args.base).to(lab.device())
        self.measure.find_formats(base)
        known = [found["points"]["pre"] for folder, _ in args.runs if (found := self.earlier(folder))]
        self.before = known[0] if known else self.measure(base)
        self.say("before SFT", self.before)

    def about(self) -> dict:
        """The base and the samples."""
        left_out = ("base", "runs", "out", "wait", "batch_tokens")
        return {"base": self.pretrained, "probe": {k: v for k, v in vars(self.args).items() if k not in left_out}}

    def earlier(self, folder: Path) -> dict | None:
        """What is known of a run of `sft.py`; ends the program where it is of another base or other samples."""
        if not (file := self.file(folder)).exists():
            return None
        found = json.loads(file.read_text())
        if {k: found[k] for k in ("base", "probe")} != self.about():
            raise SystemExit(f"{file} has the results of another base or other samples; name another --out")
        return found

    def there(self, path: Path) -> Path:
        """The file, once it is written."""
        while not path.exists():
            if time.time() - self.began > self.args.wait:
                raise FileNotFoundError(f"{path} is not there; run the stage that writes it, or give --wait")
            time.sleep(0.2)
        return path

    def say(self, name: str, result: dict) -> None:
        took = time.time() - self.began
        print(f"{took:6.1f}s  {name:28s} skill {result['skill']:.2f}  {summary(result)}", flush=True)

    def file(self, folder: Path) -> Path:
        name = folder.name.removesuffix(f"-{self.args.base.name}")
        return self.args.out.with_name(f"{self.args.out.name}-{name}.json")

    def run(self, folder: Path, which: str) -> None:
        """All points of one SFT run, into one file that grows with them."""
        sft = json.loads(self.there(folder / "sft.json").read_text())
        base, tuned = lab.load(self.args.base), lab.load(final(folder))
        about = self.about() | {"sft": sft, "drift": drift(base, tuned)}
        earlier = self.earlier(folder) or about | {"points": {"pre": self.before}}
        if any(earlier[k] != v for k, v in about.items()):
            raise SystemExit(f"{self.file(folder)} has the results of another SFT; name another --out")
        found = about | {"points": earlier["points"]}
        rows = self.held_out(sft["way"], sft["style"])
        swapper = CandidateSwap(tuned, open_folders(self.args.base, final(folder)))
        wanted = points(which, swapper.layers)
        with torch.enable_grad():
            changes = {point.name: swapper.prepare(point) for point in wanted if point.tensors}
        tuned.to(lab.device())
        for point in wanted:
            if point.name in found["points"]:
                continue
            with swapper.swapped(changes[point.name]) if point.name in changes else nullcontext():
                found["points"][point.name] = self.measure(tuned, rows)
            lab.write(self.file(folder), as_text(found))
            self.say(f"{folder.name} {point.name}", found["points"][point.name])
        if said := verdict(found, self.measure.samples, tuple(row.tokens for row in rows)):
            lab.write(self.file(folder), as_text(found | {"verdict": said}))
            print(" ".join(said["words"]), flush=True)

    def held_out(self, way: str, style: str) -> list[TaskRow]:
        """Rows such as those of an SFT, which it has not seen."""
        made = islice(examples(way, style, HELD_OUT), self.args.rows)
        return encode_rows(self.measure.tokenizer, made, LONGEST_ROW)[0]


@torch.no_grad()
def main() -> None:
    args = options().parse_args()
    repeat_keys_in_float32()
    evaluation = Evaluation(args)
    for folder, which in args.runs:
        evaluation.run(folder, which)


def summary(result: dict) -> str:
    by_length: dict[tuple[str, int], list[int]] = {}
    for task, length, _, count, hits, _ in result["recall"]:
        cell = by_length.setdefault((task, length), [0, 0])
        cell[0] += count
        cell[1] += hits
    return " ".join(
        f"{TASKS.get(task, task)}@{length}:{hits / count:.2f}" for (task, length), (count, hits) in by_length.items()
    )


def as_text(data) -> str:
    """JSON with one line per row of numbers."""
    rows: list[str] = []

    def lift(value):
        if isinstance(value, list) and value and not isinstance(value[0], (list, dict)):
            rows.append(json.dumps(value))
            return f"@{len(rows) - 1}@"
        if isinstance(value, dict):
            return {k: lift(v) for k, v in value.items()}
        return [lift(v) for v in value] if isinstance(value, list) else value

    text = json.dumps(lift(data), indent=1)
    for i, row in enumerate(rows):
        text = text.replace(f'"@{i}@"', row, 1)
    return text + "\n"


if __name__ == "__main__":
    main()
