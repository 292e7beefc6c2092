"""Stage 3, measuring: recall by length and depth, skill, attention and drift, before SFT, after it and restored.

    python recipes/amnesia-lab/evaluate.py --base runs/base-0 --run runs/full-0 --points all --out results/full-0.json

Every restore and control is one of `qkguard sweep`'s points, swapped into the one loaded model.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import lab
import torch
from fast import autocast
from torch import Tensor

from qkguard.checkpoint.offline import open_folders
from qkguard.demo.arithmetic import problems
from qkguard.demo.scores import answer_of
from qkguard.drift import head_weights, routing_drift
from qkguard.layout import find_attention
from qkguard.probe import Prober, ProbeResult
from qkguard.sweeping.points import Point, control_points, layer_points, method_points
from qkguard.sweeping.swapping import Swapper

GRID = (
    "qk-pro:gram=head/input:ridge=0.1/1/10",
    "procrustes",
    "interpolate:alpha=0.25/0.5/0.75",
    "interpolate:alpha=0.5:align",
)


def points(which: str, layers: list[int]) -> list[Point]:
    """What to measure beside "before SFT": "raw", "pair" (raw and restored), "short" (and the controls) or "all"."""
    raw, restored = Point("raw", "raw"), method_points("restore")
    if which in ("raw", "pair"):
        return [raw, *restored] if which == "pair" else [raw]
    everything = Point("Q+K+V+O only", "control", ("q", "k", "v", "o"))
    controls = [*control_points("all"), everything]
    chosen = [raw, *restored, *controls]
    if which == "all":
        chosen += [*method_points(GRID), *(layer_points(layers) if len(layers) > 1 else ())]
    return chosen


class Measure:
    """Recall on a fixed set of samples and skill on a fixed set of problems, of whatever model it is given."""

    def __init__(self, tokenizer, args) -> None:
        self.tokenizer = tokenizer
        settings = {"depths": args.depths, "seed": args.probe_seed, "batch_tokens": args.batch_tokens}
        self.probers = [
            Prober(tokenizer, lengths=args.lengths, samples=args.samples, tasks=args.tasks, **settings),
        ]
        if args.far:  # the longest contexts: fewer samples, one needle
            far = {"lengths": args.far, "samples": max(1, args.samples // 2), "tasks": args.tasks[:1]}
            self.probers.append(Prober(tokenizer, **far, **settings))
        # Other problems than those of the training text, which has seeds of its own
        self.chains = list(islice(problems(args.probe_seed, (4, 7)), args.problems))

    def find_forms(self, model) -> None:
        for prober in self.probers:
            prober.find_forms(model)

    def __call__(self, model) -> dict:
        began = time.perf_counter()
        with autocast(next(model.parameters()).device):
            probes = [prober.run(model) for prober in self.probers]
            skill = self.skill(model)
        return {
            "recall": [row for probe in probes for row in recall_rows(probe)],
            "attention": [row for probe in probes for row in attention_rows(probe)],
            "skill": round(skill, 4),
            "problems": len(self.chains),
            "seconds": round(time.perf_counter() - began, 1),
        }

    @torch.no_grad()
    def skill(self, model) -> float:
        """Share of problems whose greedily written chain of thought ends in the right answer."""
        prompts = [self.tokenizer(chain.prompt).input_ids for chain in self.chains]
        longest = max(map(len, prompts))
        place = next(model.parameters()).device
        ids = torch.full((len(prompts), longest + 112), self.tokenizer.pad_token_id, device=place)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt, device=place)
        ends = torch.tensor([len(p) for p in prompts], device=place)
        written = write_on(model, ids, ends, self.tokenizer.eos_token_id)
        said = [answer_of(self.tokenizer.decode(row, skip_special_tokens=True)) for row in written]
        return sum(a == chain.values[-1] for a, chain in zip(said, self.chains, strict=True)) / len(said)


def write_on(model, ids: Tensor, ends: Tensor, stop: int) -> Tensor:
    """Greedy continuation in place of rows (rows, room) that end at `ends`: whole passes, as nothing looks ahead."""
    rows = torch.arange(len(ids), device=ids.device)
    done = torch.zeros_like(rows, dtype=torch.bool)
    while not done.all():
        width = min(ids.shape[1], -(-int(ends.max()) // 16) * 16)
        hidden = model.model(input_ids=ids[:, :width], use_cache=False).last_hidden_state
        following = model.lm_head(hidden[rows, ends - 1]).argmax(-1)
        ids[rows, ends] = torch.where(done, ids[rows, ends], following)
        done |= following == stop
        ends = torch.where(done, ends, ends + 1)
        done |= ends == ids.shape[1] - 1
    return ids


def recall_rows(probe: ProbeResult) -> list[list]:
    """[task, length, depth, samples, hits, mean log-probability of the answer]."""
    groups = probe.by("task", "length", "depth").items()
    return [[*key, group.count, group.hits, round(group.answer_logprob, 4)] for key, group in groups]


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
    return next(f for f in (folder / "merged_raw", folder / "raw") if f.exists())


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of sft.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--points", choices=("raw", "pair", "short", "all"), default="all")
    parser.add_argument("--before", action="store_true", help="also measure the model before SFT")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--far", type=int, nargs="*", default=[65536], help="lengths with half of the samples")
    parser.add_argument("--tasks", nargs="+", default=["single_2", "multikey_1"])
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4, help="per task, length and depth")
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--probe-seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=1 << 16)
    return parser


@torch.no_grad()
def main() -> None:
    args = options().parse_args()
    began = time.time()
    tokenizer, base, tuned = lab.load_tokenizer(args.base), lab.load(args.base), lab.load(final(args.run))
    found = {"base": json.loads((args.base / "pretrain.json").read_text()), "drift": drift(base, tuned)}
    found |= {"sft": json.loads((args.run / "sft.json").read_text()), "points": {}}
    swapper = Swapper(tuned, open_folders(args.base, final(args.run)))
    wanted = points(args.points, swapper.layers)
    with torch.enable_grad():
        changes = {point.name: swapper.change(point) for point in wanted if point.tensors}
    measure = Measure(tokenizer, args)

    def note(name: str, result: dict) -> None:
        found["points"][name] = result
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(as_text(found | {"seconds": round(time.time() - began, 1)}))
        print(f"{time.time() - began:6.1f}s  {name:28s} skill {result['skill']:.2f}  {summary(result)}", flush=True)

    measure.find_forms(base.to(lab.device()))
    if args.before:
        note("pre", measure(base))
    del base
    tuned.to(lab.device())
    for point in wanted:
        if point.name in changes:
            with swapper.swapped(changes[point.name]):
                note(point.name, measure(tuned))
        else:
            note(point.name, measure(tuned))


def summary(result: dict) -> str:
    by_length: dict[tuple[str, int], list[int]] = {}
    for task, length, _, count, hits, _ in result["recall"]:
        cell = by_length.setdefault((task, length), [0, 0])
        cell[0] += count
        cell[1] += hits
    return " ".join(f"{task[:6]}@{length}:{hits / count:.2f}" for (task, length), (count, hits) in by_length.items())


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
