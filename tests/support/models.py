"""Tiny checkpoints of real architectures, built on the fly: a base and a tuned model that differ in every weight."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DELTA_NET: dict[str, Any] = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"head_dim": 16},
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 16},
    "phi3": SMALL | {"original_max_position_embeddings": 64},
    "gpt_neox": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "gpt2": {"vocab_size": 256, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 128},
    "minimax": SMALL
    | EXPERTS
    | {"head_dim": 16, "block_size": 8}
    | {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]},
    "qwen3_next": SMALL
    | DELTA_NET
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
    "qwen3_5_text": SMALL | DELTA_NET,
    "olmo_hybrid": SMALL | {k: v for k, v in DELTA_NET.items() if k != "head_dim"},
    "granitemoehybrid": SMALL
    | EXPERTS
    | {"layer_types": DELTA_NET["layer_types"], "mamba_chunk_size": 8, "mamba_d_head": 16, "mamba_d_state": 16}
    | {"mamba_n_groups": 1, "mamba_n_heads": 8, "shared_intermediate_size": 96},
}


def tiny_config(name: str, **overrides: Any) -> Any:
    """The config of a tiny model of one architecture (`CONFIGS`); `overrides` change single fields."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[name](**CONFIGS[name] | overrides)


def tiny_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """A tiny model with noise in every parameter, zero-initialised biases and unit gains included."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides), dtype=dtype)
    return noised(model, seed + 1000)


@torch.no_grad()
def noised(model: nn.Module, seed: int, scale: float = 0.02) -> nn.Module:
    """The same model with noise added to every parameter: what tuning would do, and quicker."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param += scale * torch.randn(param.shape, generator=generator).to(param.dtype)
    return model


def save_pair(
    folder: Path, name: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **overrides: Any
) -> tuple[Path, Path]:
    """Write `folder/base` and `folder/tuned`; `shard` is the largest size of one file ("60KB" gives several)."""
    model = tiny_model(name, dtype=dtype, **overrides)
    model.save_pretrained(folder / "base", max_shard_size=shard)  # type: ignore[operator]
    noised(model, seed=7)
    model.save_pretrained(folder / "tuned", max_shard_size=shard)  # type: ignore[operator]
    return folder / "base", folder / "tuned"
