"""A short training in a framework's own hands: runs in the framework's environment (`test_frameworks.py` starts it).

    python -m tests.integrations.framework_cases ms-swift SETTINGS.json

The settings name the tiny model, its rows, the output folder, and what docs/frameworks.md says to add. Every case
saves at step 2 and at step 4, its last.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

STEPS, EVERY = 4, 2


def axolotl(given: dict[str, Any]) -> None:
    """axolotl's config loading and its `train`; rows are tokenised here, because it starts processes to do so."""
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import TrainDatasetMeta
    from axolotl.integrations.base import PluginManager
    from axolotl.train import train
    from datasets import Dataset
    from transformers import AutoTokenizer

    settings = {
        "base_model": given["model"],
        "datasets": [{"path": given["rows"], "ds_type": "json", "type": "chat_template"}],
        "output_dir": given["out"],
        "val_set_size": 0,
        "sequence_len": 128,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "save_steps": EVERY,
        "logging_steps": 1,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-2,
        "bf16": False,
        "fp16": False,
        "tf32": False,
    }
    file = Path(given["folder"]) / "axolotl.yaml"
    file.write_text(yaml.safe_dump(settings) + given["added"])
    cfg = load_cfg(str(file))
    assert "qkguard.integrations.axolotl.QKGuardPlugin" in PluginManager.get_instance().plugins  # beside its own
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    texts = [json.loads(line)["messages"][1]["content"] for line in Path(given["rows"]).read_text().splitlines()]
    ids = [tokenizer.encode(text) for text in texts]
    rows = Dataset.from_list([{"input_ids": i, "labels": i, "attention_mask": [1] * len(i)} for i in ids])
    train(cfg, TrainDatasetMeta(train_dataset=rows, total_num_steps=STEPS))


def ms_swift(given: dict[str, Any]) -> None:
    """`swift sft` with the arguments of the page."""
    from swift.pipelines import sft_main

    options = {
        "model_type": "llama",
        "template": "dummy",
        "tuner_type": "full",
        "max_steps": STEPS,
        "save_steps": EVERY,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "torch_dtype": "float32",
        "use_hf": "true",
        "gradient_checkpointing": "false",
        "split_dataset_ratio": 0,
        "report_to": "none",
        "add_version": "false",
    }
    sft_main([*given["added"], *(str(word) for key, value in options.items() for word in (f"--{key}", value))])


def llamafactory(given: dict[str, Any]) -> None:
    """LLaMA-Factory's `run_exp`, as the module of the page calls it."""
    import yaml

    folder = Path(given["folder"])
    shutil.copy(given["rows"], folder / "rows.jsonl")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages"}
    about = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": about}))
    settings = {
        "model_name_or_path": given["model"],
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(folder),
        "dataset": "rows",
        "template": "default",
        "cutoff_len": 128,
        "output_dir": given["out"],
        "max_steps": 1,  # what follows the file wins
        "save_steps": EVERY,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
    }
    file = folder / "train.yaml"
    file.write_text(yaml.safe_dump(settings) + given["added"])
    module, *_ = given["command"]
    sys.argv = [module, str(file), f"max_steps={STEPS}"]
    runpy.run_module(module, run_name="__main__")


def unsloth(given: dict[str, Any]) -> None:
    """Unsloth's loader and its SFTTrainer, on its CPU backend: full fine-tuning, and LoRA into a folder beside."""
    from unsloth import FastLanguageModel  # isort: skip: before the others, as it asks

    import torch
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    from qkguard import QKGuardCallback

    assert SFTTrainer._unsloth_cpu  # its own
    rows = load_dataset("json", data_files=given["rows"], split="train")
    for full, out in ((True, given["out"]), (False, given["out"] + "-lora")):
        model, tokenizer = FastLanguageModel.from_pretrained(
            given["model"], max_seq_length=128, dtype=torch.float32, load_in_4bit=False, full_finetuning=full
        )
        if not full:
            model = FastLanguageModel.get_peft_model(model, r=8, target_modules=["q_proj", "k_proj", "v_proj"])
        args = SFTConfig(
            output_dir=out,
            max_steps=STEPS,
            save_steps=EVERY,
            logging_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            bf16=False,
        )
        guard = QKGuardCallback(restore_on="save", probe_lengths=[256])
        SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=args, callbacks=[guard]).train()


def unsloth_patches(given: dict[str, Any]) -> None:
    """The layout of a model that Unsloth has patched for a GPU, as its loader does it, is the one before."""
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"  # load the code for GPUs where there is none
    import unsloth.models.llama as patching  # isort: skip: before the others, as it asks

    from transformers import AutoModelForCausalLM

    from qkguard.errors import UnknownLayoutError
    from qkguard.layout import find_attention

    model = AutoModelForCausalLM.from_pretrained(given["model"])
    before = find_attention(model)
    snapshot = patching._snapshot_transformers_modules(patching.FastLlamaModel)
    patching.FastLlamaModel.pre_patch()
    patching._record_pre_patch_changes(snapshot)
    patching._gate_pre_patch_to_unsloth_models(snapshot)
    patching.mark_unsloth_fast_path(model)
    assert type(model.model.layers[0].self_attn).forward._unsloth_gated
    assert find_attention(model) == before
    (file,) = (file for file in snapshot if "llama" in file.__name__)
    del file._unsloth_pre_patch_originals  # the twin: without what Unsloth keeps, nothing is found
    try:
        find_attention(model)
    except UnknownLayoutError:
        return
    raise AssertionError("found in the code for GPUs")


CASES = {
    "axolotl": axolotl,
    "ms-swift": ms_swift,
    "llamafactory": llamafactory,
    "unsloth": unsloth,
    "unsloth-patches": unsloth_patches,
}

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "UNSLOTH_FORCE_CPU": "1"}
    name, file = sys.argv[1:]
    CASES[name](json.loads(Path(file).read_text()))
