"""Tiny LoRA adapters and PEFT's own merges of them, to judge ours by."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support import oracle
from tests.support.models import noised

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj"]


def save_adapter(base: Path, folder: Path, *, seed: int = 5, scale: float = 0.05, **config: Any) -> Path:
    """An adapter on `base` with noise in all of its parameters, saved by PEFT."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | config))
        trained = torch.nn.ParameterList([p for p in model.parameters() if p.requires_grad])
        noised(trained, seed, scale)
        model.save_pretrained(folder)
    return folder


def peft_merge(base: Path, adapter: Path, folder: Path) -> dict[str, Tensor]:
    """Tensors of stock PEFT's safe merge, through its own loading and transformers' saving."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        model.merge_and_unload(safe_merge=True).save_pretrained(folder)
    return oracle.load_folder(folder)


def expected_merge(name: str, base: Path, merged: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's merge with the base's query and key rows put back, by the hand-written table."""
    return oracle.expected(name, oracle.load_folder(base), merged)
