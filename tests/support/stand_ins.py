"""What the pages of the documentation name, made small: BASE, TUNED, MODEL, ADAPTER, data, a recipe's model, a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from trl import SFTConfig, SFTTrainer

import qkguard.demo
from qkguard import QKGuardCallback
from tests.support.lora import LINEAR, save_adapter
from tests.support.zoo import tiny_config

DEMO = Path(qkguard.demo.__file__).parent / "model"
ROW = {"prompt": "m = 3 ; n = m + 1 ; n = ? ", "answer": "4"}
TURNS = [{"role": "user", "content": "1 + 2 = "}, {"role": "assistant", "content": "3"}]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"


def make_stand_ins(root: Path) -> Path:
    """The folders and files that commands are given in the pages, in `root`."""
    for name in ("BASE", "TUNED", "MODEL", "qkguard/demo/model"):  # the last as in a clone
        shutil.copytree(DEMO, root / name)
    weights = load_file(root / "TUNED/model.safetensors")
    noise = torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if value.dim() == 2:
            weights[name] = value + 0.02 * torch.randn(value.shape, generator=noise).to(value.dtype)
    save_file(weights, root / "TUNED/model.safetensors", {"format": "pt"})
    shutil.copytree(root / "TUNED", root / "MERGED")
    save_adapter(root / "BASE", root / "ADAPTER", target_modules=LINEAR)
    (root / "heldout.jsonl").write_text(json.dumps(ROW) + "\n")
    rows = ({"prompt": ROW["prompt"], "completion": f"m = {i} ; n = {i} + 1 ; 4"} for i in range(4))
    (root / "cot.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "prose.txt").write_text("The old farmer walked to the market. The night was cold. " * 20)
    tiny_config("qwen3_5").save_pretrained(root / "qwen3.5")
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, root / "qwen3.5")
    (root / "rows.jsonl").write_text("".join(json.dumps({"messages": TURNS}) + "\n" for _ in range(20)))
    (root / "qwen3.5/chat_template.jinja").write_text(TEMPLATE)
    return root


def guarded_run(folder: Path, steps: int = 2, peft_config: Any = None, **settings: Any) -> Path:
    """A guarded training of the demo's model, with an evaluation set, a save, probes and a verdict."""
    rows = Dataset.from_list([{"prompt": ROW["prompt"], "completion": ROW["answer"]}] * 8)
    args = SFTConfig(
        str(folder),
        max_steps=steps,
        save_steps=steps,
        logging_steps=1,
        per_device_train_batch_size=1,
        learning_rate=2e-3,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    small = {"probe_lengths": [256], "probe_depths": 2, "probe_samples": 2, "probe_budget": None}
    guard = QKGuardCallback(routing_drift_steps="logging", **small | settings)
    data = {"train_dataset": rows, "eval_dataset": rows.select(range(2))}
    SFTTrainer(str(DEMO), args, peft_config=peft_config, callbacks=[guard], **data).train()
    return folder
