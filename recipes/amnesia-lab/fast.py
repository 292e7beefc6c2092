"""The stock MiniMax modules in forms that a GPU runs without waiting: the same functions, other kernels.

A model of 2.5 M parameters is bound by kernel launches, not by arithmetic. Three modules are replaced on the instance,
and a whole forward and backward pass is replayed as one CUDA graph per batch shape.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from model import _dense_mlp
from torch import Tensor, nn
from transformers import MiniMaxForCausalLM
from transformers.integrations import sdpa_attention

BLOCK = 128
ask_for_grouped_keys = sdpa_attention.use_gqa_in_sdpa
NO_MASKS = {"full_attention": None, "linear_attention": None}  # rows without padding: no mask to build


def speed_up(model: MiniMaxForCausalLM) -> MiniMaxForCausalLM:
    """The same model with lightning attention over all blocks at once, fused norms, and its one expert as an MLP."""
    forms = {
        "MiniMaxLightningAttention": _lightning_attention,
        "MiniMaxRMSNorm": _rms_norm,
        "MiniMaxSparseMoeBlock": _dense_mlp,
    }
    for module in model.modules():
        if (form := forms.get(type(module).__name__)) is not None:
            module.forward = MethodType(form, module)
    return model


def repeat_keys_in_float32() -> None:
    """Keys are not grouped in float32, where only the kernel that holds all scores of a layer does it: 4 GB at 16K."""
    sdpa_attention.use_gqa_in_sdpa = _grouped_keys


def _grouped_keys(mask, key: Tensor, *rest) -> bool:
    return key.dtype != torch.float32 and ask_for_grouped_keys(mask, key, *rest)


def _rms_norm(norm, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states.float(), hidden_states.shape[-1:], norm.weight, norm.variance_epsilon)


def _lightning_attention(layer, hidden_states: Tensor, *args, attention_mask=None, past_key_values=None, **kwargs):
    """Linear attention with a decay per head, block by block, without a loop: the state that enters each block is a
    weighted sum of the earlier blocks' key-value products.
    """
    if past_key_values is not None or args:
        masks = {"attention_mask": attention_mask, "past_key_values": past_key_values}
        return type(layer).forward(layer, hidden_states, *args, **masks, **kwargs)
    rows, length, _ = hidden_states.shape
    heads, size = layer.num_attention_heads, layer.head_dim
    block = min(BLOCK, length)
    blocks = -(-length // block)
    mixed = layer.act_fn(layer.qkv_proj(hidden_states))
    if attention_mask is not None:
        mixed = (mixed * attention_mask[:, :, None]).to(mixed.dtype)
    mixed = F.pad(mixed, (0, 0, 0, blocks * block - length)).view(rows, blocks, block, heads, 3 * size)
    query, key, value = mixed.permute(0, 3, 1, 2, 4).split(size, -1)  # each (rows, heads, blocks, block, size)

    slope = layer.slope_rate.float().view(heads, 1, 1)
    place = torch.arange(block, device=mixed.device).float()
    within = _decay(slope, place[:, None] - place)[:, None].to(mixed.dtype)
    out = (query @ key.mT * within) @ value
    if blocks > 1:
        left = torch.exp(-slope * (block - 1 - place[:, None]))[:, None].to(mixed.dtype)
        products = (key * left).mT @ value
        order = torch.arange(blocks, device=mixed.device).float()
        entering = _decay(slope * block, order[:, None] - 1 - order).to(mixed.dtype) @ products.flatten(3)
        passed = torch.exp(-slope * (place[:, None] + 1))[:, None].to(mixed.dtype)
        out = out + (query * passed) @ entering.view_as(products)
    out = out.permute(0, 2, 3, 1, 4).reshape(rows, blocks * block, heads * size)[:, :length]
    return layer.out_proj(torch.sigmoid(layer.output_gate(hidden_states)) * layer.norm(out)), None


def _decay(slope: Tensor, distance: Tensor) -> Tensor:
    """exp(-slope * distance) for distances from 0, else 0."""
    return torch.exp(-slope * distance.clamp(min=0)) * (distance >= 0)


def autocast(device: torch.device):
    """bfloat16 on a GPU. Without the cache of cast weights, which a captured graph must not share."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def losses(model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean next-token loss of the ordinary tokens and of the answers (`mask`), by sums of a fixed shape."""
    with autocast(ids.device):
        logits = model(input_ids=ids, attention_mask=NO_MASKS, use_cache=False).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    answer = mask[:, 1:].flatten().float()
    plain = 1 - answer
    return (each * plain).sum() / plain.sum().clamp(min=1), (each * answer).sum() / answer.sum().clamp(min=1)


class Gradients:
    """`gradients(ids, mask, weight)` fills the parameters' gradients of plain loss + weight * answer loss.

    On a GPU the pass is captured once per shape and weight, then replayed. Returns both losses, which the next call
    overwrites.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.graphs, self.pool = model, {}, None
        self.parameters = list(model.parameters())
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)  # graphs add into these very tensors

    def __call__(self, ids: Tensor, mask: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        if not ids.is_cuda:
            return self._pass(ids, mask, weight)
        key = (tuple(ids.shape), weight)
        if key not in self.graphs:
            self.graphs[key] = self._capture(ids.clone(), mask.clone(), weight)
        graph, held_ids, held_mask, out = self.graphs[key]
        held_ids.copy_(ids)
        held_mask.copy_(mask)
        graph.replay()
        return out

    def _pass(self, ids: Tensor, mask: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        torch._foreach_zero_([p.grad for p in self.parameters])
        plain, answer = losses(self.model, ids, mask)
        (plain + weight * answer).backward()
        return plain.detach(), answer.detach()

    def _capture(self, ids: Tensor, mask: Tensor, weight: float):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # warm-up outside of the capture
            for _ in range(2):
                self._pass(ids, mask, weight)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = self._pass(ids, mask, weight)
        self.pool = self.pool or graph.pool()
        return graph, ids, mask, out
