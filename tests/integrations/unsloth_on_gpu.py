"""Guarded Unsloth trainings of tiny models on a GPU, one process each: which ways work, and what they leave.

    python -m tests.integrations.unsloth_on_gpu OUT [MODEL-MODE-WAY ...]

MODEL is llama or qwen3 (Unsloth's own attention code) or olmo2 (its compiled copy of transformers'); MODE is lora,
full or qlora; WAY is plain, spec (the layout written by `qkguard inspect` in a process of its own), noprobe or
unguarded. Prints of each what class its attention has, losses, drift, recall, which weights of the restored files
differ from the raw ones, and whether it worked.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

VARIANTS = (
    "llama-lora-unguarded",
    "llama-lora-plain",
    "llama-lora-noprobe",
    "llama-full-plain",
    "llama-qlora-spec",
    "qwen3-lora-plain",
    "olmo2-lora-plain",
    "olmo2-full-plain",
)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SECONDS = 150


def make(out: Path) -> None:
    """Tiny models with a tokenizer, and rows of two turns; nothing of Unsloth is imported here."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from tests.support.probing import CHATML, bpe_tokenizer

    tokenizer = bpe_tokenizer(CHATML)
    shape: dict[str, Any] = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    shape |= {"vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    for name in ("llama", "qwen3", "olmo2"):
        more = {} if name == "olmo2" else {"head_dim": 64}
        model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**shape, **more), dtype=torch.bfloat16)
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    said = [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(10) for b in range(10)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in said]
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in turns]
    (out / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def train(variant: str, out: Path) -> None:
    name, mode, way = variant.split("-")
    import torch
    import unsloth  # noqa: F401 - before trl, which it patches
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    from qkguard import QKGuardCallback

    kinds = {"load_in_4bit": mode == "qlora", "full_finetuning": mode == "full"}
    loading = {"max_seq_length": 512, "dtype": torch.bfloat16, **kinds}
    model, tokenizer = FastLanguageModel.from_pretrained(str(out / name), **loading)
    if mode != "full":
        adapter = {"r": 16, "lora_alpha": 32, "lora_dropout": 0, "bias": "none", "target_modules": PROJECTIONS}
        more = {"use_gradient_checkpointing": "unsloth", "random_state": 0}
        model = FastLanguageModel.get_peft_model(model, **adapter, **more)
    attention = next(m for n, m in model.named_modules() if n.endswith("self_attn"))
    print("CLASS", type(attention).__module__, type(attention).forward.__module__, flush=True)
    settings: dict[str, Any] = {"probe_lengths": [256], "drift_steps": 1, "strict": True}
    if way == "spec":
        settings["spec"] = str(out / f"{name}.yaml")
    if way == "noprobe":
        settings |= {"probe_steps": 0, "verdict": False}
    run = out / variant
    steps = {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 4}
    SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=str(out / "rows.jsonl"), split="train"),
        args=SFTConfig(
            str(run),
            **steps,
            learning_rate=1e-3,
            report_to="none",
            max_length=128,
            bf16=True,
            dataset_text_field="text",
        ),
        callbacks=[] if way == "unguarded" else [QKGuardCallback(**settings)],
    ).train()
    history = json.loads((run / "checkpoint-8/trainer_state.json").read_text())["log_history"]
    print("LOSSES", [row["loss"] for row in history if "loss" in row])
    if way != "unguarded":
        describe(run)


def describe(run: Path) -> None:
    """Drift by step, recall, and which weights of the restored files are not the raw ones."""
    from safetensors.torch import load_file

    rows = [json.loads(line) for line in (run / "_qkguard/metrics.jsonl").read_text().splitlines()]
    for key in ("qkguard/drift/q_rel", "qkguard/niah/recall"):
        print(key, [(row["step"], row[key]) for row in rows if key in row])
    for file in sorted((run / "checkpoint-8/qk_restored").rglob("*.safetensors")):
        restored, raw = load_file(file), run / "checkpoint-8" / file.name
        tensors = load_file(raw) if raw.is_file() else {}
        differ = {name for name in tensors if name not in restored or not tensors[name].equal(restored[name])}
        print("RESTORED", file.relative_to(run), sorted({re.sub(r"\d+", "N", name) for name in differ}))


def main(out: Path, variants: list[str]) -> None:
    """Every variant in a process of its own, and the lines of its log that tell what came of it."""
    out.mkdir(parents=True, exist_ok=True)
    make(out)
    for name in ("llama", "qwen3", "olmo2"):
        command = [
            sys.executable,
            "-m",
            "qkguard",
            "inspect",
            str(out / name),
            "--write-spec",
            str(out / f"{name}.yaml"),
        ]
        subprocess.run(command, check=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for variant in variants or VARIANTS:
        log = out / f"{variant}.log"
        command = [sys.executable, "-m", "tests.integrations.unsloth_on_gpu", str(out), variant, "--here"]
        with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        told = [
            line for line in log.read_text(errors="replace").splitlines() if re.match(r"[A-Z]{5,8} |qkguard/", line)
        ]
        print(f"{variant}:", *(told or ["no outcome: see its log"]), sep="\n  ", flush=True)


if __name__ == "__main__":
    place, *chosen = sys.argv[1:]
    if "--here" not in chosen:
        main(Path(place).resolve(), chosen)
        sys.exit()
    try:
        train(chosen[0], Path(place))
        print("OUTCOME worked", flush=True)
    except Exception as error:
        traceback.print_exc()
        print("OUTCOME", type(error).__name__, " ".join(str(error).split())[:700], flush=True)
