"""The study, one base: its diagnosis on every kind of data, and the recall that is left after training on it.

    python recipes/amnesia-lab/study_base.py --base runs/one-0 --results runs/study/one-0.json --seed 0

study.py starts one of these for every base. A result that is there already, of the same settings, is not made again.
The trainings are those of sft.py in a loop of its own, which a GPU replays as one graph: batches of 32 rows, AdamW
without weight decay, a linear schedule, gradients clipped at 1, the loss on completions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import lab
import torch
from evaluate import as_text, recall_rows
from fast import Gradients, repeat_keys_in_float32
from sft import examples
from tables import TASKS
from torch import Tensor

from qkguard.diagnosis.measure import Measured, TextRow, measure
from qkguard.layout import find_attention
from qkguard.offline.diagnose import compare_heads
from qkguard.offline.diagnosed_rows import text_windows, training_rows
from qkguard.probe import Prober, ProbeSettings
from qkguard.probe.haystack import generated_prose
from qkguard.probe.retrieval import LayerScore, choose_layers

# Kind of data: way and style of sft.py
DATA = {
    "word": ("full", "word"),
    "tag": ("full", "tag"),
    "plain": ("full", "plain"),
    "echo": ("full", "echo"),
    "windows": ("windows", "word"),
    "rewrite": ("rewrite", "plain"),
}
TRAININGS = ("2e-3:300", "1e-3:300", "1e-3:100", "3e-4:300")  # learning rate and steps
LONGEST = 1024  # tokens of a row
GRAM = 4
BATCH = 32


def repeated(rows: list[TextRow]) -> float:
    """Share of the rows' 4-grams of tokens that stand earlier in the same row: a predictor that needs no model."""
    again = count = 0
    for row in rows:
        grams = [row.ids[i : i + GRAM] for i in range(len(row.ids) - GRAM + 1)]
        again += len(grams) - len(set(grams))
        count += len(grams)
    return again / max(1, count)


def numbers(found: Measured, prose: Measured, heads: tuple[LayerScore, ...]) -> dict[str, float | None]:
    """What the diagnosis says of one kind of data."""
    retrieval = compare_heads(found, heads, 1.0)
    return {
        "w_corr": found.w_corr.value,
        "w_grad": found.w_grad.value,
        "far_share": found.far_share.value,
        "w_corr less prose": found.w_corr.value - prose.w_corr.value,
        "w_grad less prose": found.w_grad.value - prose.w_grad.value,
        "far_share less prose": found.far_share.value - prose.far_share.value,
        "overlap": None if retrieval is None else retrieval.overlap,
        "far overlap": None if retrieval is None else retrieval.overlap_far,
    }


class Trainings:
    """Trainings of one model on one kind of data, each from the weights that it has now."""

    def __init__(self, model, rows: list[TextRow], pad: int) -> None:
        self.model, self.rows, self.pad = model, rows, pad
        self.width = max(len(row.ids) for row in rows)  # of all batches: one graph
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.gradients = Gradients(model)

    def batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and what is not trained on: prompts and padding."""
        for start in range(0, steps * BATCH, BATCH):
            rows = [self.rows[i % len(self.rows)] for i in range(start, start + BATCH)]
            ids = torch.full((BATCH, self.width), self.pad)
            ignored = torch.ones(BATCH, self.width, dtype=torch.bool)
            for line, kept, row in zip(ids, ignored, rows, strict=True):
                line[: len(row.ids)] = torch.tensor(row.ids)
                kept[: len(row.ids)] = ~torch.tensor(row.scored)
            yield ids.to(self.model.device), ignored.to(self.model.device)

    def run(self, lr: float, steps: int) -> float:
        """Train; the mean loss of the last tenth of the steps."""
        self.back()
        optimizer = torch.optim.AdamW(self.gradients.parameters, lr=lr, weight_decay=0.0)
        warm, losses = max(1, steps // 20), []
        for step, (ids, ignored) in enumerate(self.batches(steps)):
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
            loss, _ = self.gradients(ids, ignored, 0.0)
            torch.nn.utils.clip_grad_norm_(self.gradients.parameters, 1.0)
            optimizer.step()
            losses.append(loss.clone())
        last = losses[-max(1, steps // 10) :]
        return float(torch.stack(last).mean())

    @torch.no_grad()
    def back(self) -> None:
        """The weights from before."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.before[name])

    def end(self) -> None:
        """The weights from before, without gradients."""
        self.back()
        for parameter in self.gradients.parameters:
            parameter.grad = None


class Base:
    """One base, and what has been measured of it."""

    def __init__(self, args) -> None:
        self.args, self.began = args, time.time()
        self.tokenizer = lab.load_tokenizer(args.base)
        self.model = lab.load(args.base).to(lab.device())
        settings = {"lengths": args.lengths, "depths": args.depths, "samples": args.samples, "tasks": args.tasks}
        self.prober = Prober(self.tokenizer, ProbeSettings(**settings, batch_tokens=args.batch_tokens))
        left_out = ("base", "results", "data", "trainings", "batch_tokens")
        about = {"base": lab.base(args.base), "settings": {k: v for k, v in vars(args).items() if k not in left_out}}
        self.found = about | {"data": {}}
        if args.results.exists():
            self.found = json.loads(args.results.read_text())
            if any(self.found[key] != value for key, value in about.items()):
                raise SystemExit(f"{args.results} has the results of another base or settings; name other --results")
        self.prober.find_formats(self.model)
        before = self.prober.run(self.model)
        self.found["before"] = recall_rows(before)
        self.heads = choose_layers(before.retrieval, find_attention(self.model)).scores

    def rows(self, kind: str, count: int) -> list[TextRow]:
        way, style = DATA[kind]
        made = list(islice(examples(way, style, self.args.seed), count))
        return training_rows(self.tokenizer, made, LONGEST)[0]

    def diagnose(self, kind: str) -> dict:
        """The numbers of one kind of data."""
        rows = self.rows(kind, self.args.rows)
        text = " ".join(islice(generated_prose(Random(self.args.seed)), self.args.rows * LONGEST // 8))
        prose, _ = text_windows(self.tokenizer, text, [len(row.ids) for row in rows], "prose")
        found = [measure(self.model, part, kind, far=self.args.far) for part in (rows, prose)]
        said = numbers(found[0], found[1], self.heads)
        return {"numbers": said, "repeated": repeated(rows), "diagnosis": found[0].to_json() | {"curves": None}}

    def run(self, kind: str, trainings: list[str]) -> None:
        """Diagnose and train on one kind of data."""
        if kind not in self.found["data"]:
            self.found["data"][kind] = self.diagnose(kind) | {"trainings": {}}
        done = self.found["data"][kind]["trainings"]
        wanted = [name for name in trainings if name not in done]
        if wanted:
            steps = max(int(name.split(":")[1]) for name in wanted)
            trainer = Trainings(self.model, self.rows(kind, steps * BATCH), self.tokenizer.pad_token_id)
            for name in wanted:
                lr, count = name.split(":")
                loss = trainer.run(float(lr), int(count))
                done[name] = {"loss": loss, "recall": recall_rows(self.prober.run(self.model))}
                lab.write(self.args.results, as_text(self.found))
                print(f"{time.time() - self.began:6.1f}s  {kind} {name}  loss {loss:.3f}", flush=True)
            trainer.end()
        lab.write(self.args.results, as_text(self.found))


def training(text: str) -> str:
    lr, _, steps = text.partition(":")
    try:
        float(lr), int(steps)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not RATE:STEPS, such as {TRAININGS[0]}") from None
    return text


def options() -> argparse.ArgumentParser:
    parser = lab.parser(__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True, help="JSON file, which grows with every training")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--trainings", nargs="+", type=training, default=list(TRAININGS), metavar="RATE:STEPS")
    parser.add_argument("--rows", type=int, default=64, help="that the diagnosis reads")
    parser.add_argument("--far", type=int, default=32, help="keys more than this many tokens back are far")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4, help="per task, length and depth")
    parser.add_argument("--batch-tokens", type=int, default=1 << 16, help="of a probe's batch; less on a CPU")
    return parser


def main() -> None:
    args = options().parse_args()
    repeat_keys_in_float32()
    torch.manual_seed(args.seed)
    base = Base(args)
    for kind in args.data:
        base.run(kind, args.trainings)


if __name__ == "__main__":
    main()
