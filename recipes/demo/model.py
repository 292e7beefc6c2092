"""The demo's architecture: lightning (linear) attention with two softmax layers that have no position encoding."""

from __future__ import annotations

from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MiniMaxConfig, MiniMaxForCausalLM

LAYERS = "LLALLA"  # L lightning, A softmax
MAX_POSITIONS = 8192


def build_config(
    tokenizer,
    *,
    hidden: int = 192,
    heads: int = 4,
    block_size: int = 64,
    layers: str = LAYERS,
    positions: int = MAX_POSITIONS,
) -> MiniMaxConfig:
    """A HypeNet-like hybrid in miniature, as a stock transformers class; `layers` as in `LAYERS`.

    MiniMax always applies rotary embeddings to its softmax layers. Stretching positions by 1e9 leaves every rotation
    below 1e-5 rad inside the context: no position encoding (NoPE), as in HypeNet. `block_size` only says how lightning
    attention is cut into pieces; the function is the same for any value.
    """
    return MiniMaxConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=len(layers),
        layer_types=["full_attention" if kind == "A" else "linear_attention" for kind in layers],
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        num_local_experts=1,
        num_experts_per_tok=1,
        block_size=block_size,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "linear", "factor": 1e9, "rope_theta": 1e4},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_model(config: MiniMaxConfig) -> MiniMaxForCausalLM:
    """A freshly initialised model in float32 whose single expert runs as the plain MLP that it is.

    The stock expert loop sorts tokens by expert and waits for the GPU to do so; with one expert its weight is
    exactly 1 and the dense formula gives the same numbers.
    """
    model = MiniMaxForCausalLM(config).float()
    for layer in model.model.layers:
        layer.mlp.forward = MethodType(_dense_mlp, layer.mlp)
    return model


def _dense_mlp(block, hidden_states: Tensor) -> Tensor:
    experts = block.experts
    gate, up = F.linear(hidden_states, experts.gate_up_proj[0]).chunk(2, dim=-1)
    return F.linear(experts.act_fn(gate) * up, experts.down_proj[0])


def save_half(model: MiniMaxForCausalLM, config: MiniMaxConfig, folder) -> None:
    """Write `model`'s parameters in float16 under `config` (which may cut lightning attention into other blocks)."""
    shipped = MiniMaxForCausalLM(config)
    state = model.state_dict()
    parameters = dict(shipped.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    shipped.to(torch.float16).save_pretrained(folder)
    # Half precision is only for the disk: "auto" should load a model that a CPU can train.
    path = Path(folder, "config.json")
    path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
