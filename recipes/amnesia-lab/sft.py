"""Stage 2, CoT-SFT under guard: TRL's SFTTrainer with the callback, on arithmetic worked out line by line.

    python recipes/amnesia-lab/sft.py --base runs/one-0 --out runs/full-one-0 --seed 0

`--way` says what else could be done: queries and keys frozen, LoRA, windows with prose between question and work, or
another task altogether, sentences to rewrite.
The model lies in <out>/_qkguard/final/raw (LoRA: merged_raw) beside its restored twin.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import lab
import torch
from datasets import Dataset
from peft import LoraConfig
from text import STYLES, rewriting
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from qkguard import QKGuardCallback
from qkguard.demo.arithmetic import problems
from qkguard.layout import find_attention, select
from qkguard.probe.haystack import generated_prose

WAYS = ("full", "frozen", "lora", "windows", "rewrite")
LONGEST_GAP = 60  # sentences of some 12 tokens between question and work, `--way windows`
LORA = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "output_gate"],
    task_type="CAUSAL_LM",
)


def rows(args) -> Dataset:
    """Problems of 4 to 7 variables, as many as the run will see; or as many texts to rewrite."""
    return Dataset.from_list(list(islice(examples(args.way, args.style, args.seed), args.steps * args.batch)))


def examples(way: str, style: str, seed: int) -> Iterator[dict[str, str]]:
    """Endless rows of prompt and completion."""
    rng = Random(2000 + seed)
    while way == "rewrite":
        prompt, completion = rewriting(rng)
        yield {"prompt": prompt, "completion": completion}
    for chain in problems(1000 + seed):
        prompt = chain.prompt
        if way == "windows":
            question, think = prompt.split("\n")
            gap = " ".join(islice(generated_prose(rng), rng.randint(0, LONGEST_GAP)))
            prompt = f"{question}\n{gap}\n{think}"
        yield {"prompt": prompt, "completion": STYLES[style](chain, rng)}


def options() -> argparse.ArgumentParser:
    parser = lab.parser(__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--way", choices=WAYS, default="full")
    parser.add_argument("--style", choices=STYLES, default="word")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    return parser


def main() -> None:
    args = options().parse_args()
    began = time.time()
    record = {k: v for k, v in vars(args).items() if k != "out"} | {"base": lab.base(args.base)}
    if lab.made(args.out / "sft.json", record):
        return
    gpu = lab.device() == "cuda"
    tokenizer, model = lab.load_tokenizer(args.base), lab.load(args.base)
    if args.way == "frozen":
        for _, params in select(find_attention(model)):
            for param in params:
                model.get_parameter(param.name).requires_grad_(False)
    config = SFTConfig(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        lr_scheduler_type="linear",
        warmup_steps=max(1, args.steps // 20),
        optim="adamw_torch",
        max_length=2048,
        seed=args.seed,
        logging_steps=max(1, args.steps // 60),
        save_strategy="no",
        report_to="none",
        use_cpu=not gpu,
        bf16=gpu,
        gradient_checkpointing=False,
        disable_tqdm=True,
        router_aux_loss_coef=0.0,  # one expert has nothing to balance
    )
    # Recall is measured afterwards, on more samples than a probe in between would take
    guard = QKGuardCallback(routing_drift_steps=0, probe_steps=0, merge_at_end=args.way == "lora")
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=rows(args),
        processing_class=tokenizer,
        peft_config=LORA if args.way == "lora" else None,
        callbacks=[guard],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    record |= {"losses": [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row]}
    record |= {"seconds": round(time.time() - began, 1), "device": torch.cuda.get_device_name() if gpu else "CPU"}
    lab.write_json(args.out / "sft.json", record)


if __name__ == "__main__":
    main()
