"""Drift from LoRA's factors against dense float64 weights that PEFT's formulas give."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from qkguard.adapters import drift as lora_drift
from qkguard.adapters.live import adapted_weights
from qkguard.distributed.ranks import Deferred
from qkguard.drift import routing_drift
from qkguard.layout import find_attention, select
from tests.support import oracle
from tests.support.lora import LINEAR
from tests.support.models import noised, tiny_model

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": LINEAR}),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "patterns": ("llama", {"target_modules": LINEAR, "rank_pattern": {"k_proj": 2}, "use_rslora": True}),
    "queries alone": ("minimax", {"target_modules": ["q_proj"]}),
    "gated, dora": ("qwen3_next", {"target_modules": LINEAR, "use_dora": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj"]}),
    "fused by head, dora": ("gpt_neox", {"target_modules": ["query_key_value"], "use_dora": True}),
    "transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "transposed, dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
}
ATTENTION = r"(self_attn\.[qk]_proj|qkv_proj|query_key_value|c_attn)\.base_layer\.weight$"


def adapted(name: str, adapters: int = 1, **config: Any) -> Any:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        settings = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | config)
        model = get_peft_model(tiny_model(name), settings)
        for extra in range(1, adapters):
            model.add_adapter(f"more{extra}", settings)
        if adapters > 1:
            model.base_model.set_adapter(list(model.peft_config))
    noised(torch.nn.ParameterList([p for n, p in model.named_parameters() if "lora_" in n]), 3, 0.05)
    return model


def dense(model: Any, path: str) -> tuple[Tensor, Tensor]:
    """(W0, effective W) of one layer, (outputs, inputs), float64: PEFT's documented formulas."""
    layer = model.get_submodule(path)
    before = layer.base_layer.weight.double()
    before = before.T if layer.fan_in_fan_out else before
    after = before.clone()
    for name in layer.active_adapters:
        delta = layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double() * layer.scaling[name]
        if name in layer.lora_variant:
            magnitude = layer.lora_magnitude_vector[name].weight.double().reshape(-1, 1)
            delta = magnitude * (before + delta) / (before + delta).norm(dim=1, keepdim=True) - before
        after = after + delta
    return before, after


def rows(name: str, size: int) -> dict[str, list[int]]:
    """Output rows of queries and keys in a fused projection, by hand."""
    heads, head = oracle.HEADS, oracle.HEAD
    if name == "phi3":
        return {"q": list(range(64)), "k": list(range(64, 96))}
    if name == "gpt2":
        return {"q": list(range(64)), "k": list(range(64, 128))}
    if name == "gpt_neox":
        part = {"q": 0, "k": head}
        return {r: [3 * head * h + part[r] + i for h in range(heads) for i in range(head)] for r in "qk"}
    gated = name in ("qwen3_next", "qwen3_5_text")
    queries = [2 * head * h + i for h in range(heads) for i in range(head)] if gated else list(range(64))
    return {"q": queries, "k": list(range(size))}


@torch.no_grad()
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_drift_is_that_of_the_dense_weights(case, adapters, monkeypatch):
    name, config = CASES[case]
    monkeypatch.setattr(lora_drift, "_CHUNK", 5 * 64)  # several chunks, not a divisor of the rows
    model = adapted(name, adapters, **config)
    selection = select(find_attention(model))
    tracker = lora_drift.AdapterDriftMonitor(model, selection, adapted_weights(model, selection))
    for _ in range(2):  # the second time from the products kept
        metrics, heads = tracker.measure(model, Deferred("measuring"), routing=True)
    checked = 0
    for spec, _ in selection:
        weights: dict[str, tuple[Tensor, Tensor]] = {}
        for path in (n for n, _ in model.named_parameters() if f".{spec.layer}." in n and re.search(ATTENTION, n)):
            module = path.removesuffix(".base_layer.weight")
            before, after = dense(model, module)
            own = module.rpartition(".")[2]
            for role in "qk" if own not in ("q_proj", "k_proj") else own[0]:
                pick = rows(name, len(before))[role]
                weights[role] = before[pick], after[pick]
        if "k" not in weights:  # no adapter
            key = model.get_submodule(f"base_model.model.{spec.module}").k_proj.weight.double()
            weights["k"] = key, key
        for role, (w0, w) in weights.items():
            label = f"qkguard/drift/layer_{spec.layer}"
            rel = float((w - w0).norm() / w0.norm())
            cos = 1 - float((w * w0).sum() / w.norm() / w0.norm())
            assert metrics[f"{label}/{role}_rel"] == pytest.approx(rel, rel=1e-9, abs=1e-15)
            assert metrics[f"{label}/{role}_1mcos"] == pytest.approx(cos, rel=1e-6, abs=1e-14)
            top = float(torch.linalg.matrix_norm(w - w0, 2))  # for DoRA a power iteration, from below
            assert metrics[f"{label}/{role}_top_sv"] == pytest.approx(top, rel=0.03 if "dora" in case else 1e-9)
            checked += rel > 1e-3
        parts = [t.unflatten(0, (-1, oracle.HEAD)) for role in "qk" for t in reversed(weights[role])]
        assert heads[f"layer_{spec.layer}"] == pytest.approx(routing_drift(*parts).tolist(), rel=1e-9)
    assert checked >= len(selection), "nothing moved"


def test_disabled_and_inactive_adapters_do_not_count():
    model = adapted("llama", target_modules=LINEAR)
    selection = select(find_attention(model))
    tracker = lora_drift.AdapterDriftMonitor(model, selection, adapted_weights(model, selection))
    assert tracker.measure(model, Deferred("measuring"))[0]["qkguard/drift/q_rel"] > 1e-3
    with model.disable_adapter():
        assert tracker.measure(model, Deferred("measuring"))[0]["qkguard/drift/q_rel"] == 0.0
