"""Recipes on real ranks: every bundled accelerate config, as `accelerate launch` hands it to a rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import qkguard.demo
from qkguard.distributed import ranks, sharding
from qkguard.offline.verify import verify
from tests.distributed.cases import reset
from tests.distributed.launch import launched
from tests.support import judge

DEMO = Path(qkguard.demo.__file__).parent / "model"
ROW = {"prompt": "1 + 2 = ", "completion": "3 . so 3"}


def launcher(folder: Path, name: str) -> None:
    """Two steps of SFT under one config; the reference, the loss and the restored model are those of one process."""
    from qkguard.sft.arguments import parse
    from qkguard.sft.train import train

    rows = folder / "rows.jsonl"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        rows.write_text((json.dumps(ROW) + "\n") * 16)
    dist.barrier()
    arguments = ["--model_name_or_path", str(DEMO), "--dataset_name", str(rows), "--output_dir", str(folder / "run")]
    arguments += [
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "2",
        "--bf16",
        "false",
        "--disable_tqdm",
        "true",
    ]
    arguments += ["--logging_steps", "1", "--qkguard.probe_steps", "0", "--max_length", "64"]
    seen = []
    with launched(name, arguments), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "end", lambda trainer: seen.append(trainer), raising=False)  # it would end all cases
        train(parse(arguments))
    (trainer,) = seen
    assert sharding.backend(trainer.model) == (name if name in ("zero3", "fsdp2") else "replicated")
    assert (trainer.accelerator.distributed_type == "DEEPSPEED") == name.startswith("zero")
    if trainer.is_deepspeed_enabled:
        config = trainer.accelerator.deepspeed_config
        assert config["zero_optimization"]["stage"] == int(name[-1]) and config["gradient_clipping"] == 1.0
    if ranks.rank() == 0:
        for restored in (folder / "run/checkpoint-2/qk_restored", folder / "run/_qkguard/final/qk_restored"):
            verify(restored, full=True)
        first = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
        assert abs(first - loss_before()) < 0.01  # TRL adds the experts' load balancing
        assert judge.metrics_rows(folder / "run")[-1]["step"] == 2
    dist.barrier()


def loss_before() -> float:
    """Mean cross-entropy of the completion's tokens under the base model, without TRL."""
    reset()  # else the model would be partitioned
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    prompt = len(tokenizer(ROW["prompt"])["input_ids"])
    ids = torch.tensor([[*tokenizer(ROW["prompt"] + ROW["completion"])["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, prompt - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, prompt:]))
