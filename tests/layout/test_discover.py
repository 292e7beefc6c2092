"""Layouts found by behaviour against row maps written by hand; what discovery must leave alone; what it refuses."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Distribution
from transformers import AttentionInterface

from qkguard.errors import QKGuardError, UnknownLayoutError
from qkguard.layout import AttentionSpec, Block, ParamMap, disk_names, find_attention, prove_layout
from tests.support import zoo

HEAD, QUERY_HEADS, KEY_HEADS, HIDDEN = 16, 4, 2, 64


def rows(role: str, heads: int, start: int = 0, step: int = HEAD) -> list[Block]:
    """Blocks of 16 rows, one per head, `step` apart."""
    return [Block(start + step * h, start + step * h + HEAD, role, h) for h in range(heads)]


Q, K = rows("q", QUERY_HEADS), rows("k", KEY_HEADS)
PER_HEAD = sorted(rows("q", 4, 0, 48) + rows("k", 4, 16, 48))  # GPT-NeoX: q, k, v of one head after the other
FUSED = rows("q", 4) + rows("k", 4, 64)  # GPT-2: all q, all k, all v
SHARED_GAINS = {"q_norm.weight": [Block(0, HEAD, "q")], "k_norm.weight": [Block(0, HEAD, "k")]}
OWN_GAINS = {"q_norm.weight": Q, "k_norm.weight": K}

# type -> (layers, module, parameter -> blocks, shapes of the weights, (rotary, channels))
EXPECTED: dict[str, tuple[list[int], str, dict[str, list[Block]], tuple[str, int]]] = {
    "llama": ([0, 1, 2, 3], "model.layers.{}.self_attn", {"q_proj.weight": Q, "k_proj.weight": K}, ("half", 16)),
    "qwen2": (
        [0, 1, 2, 3],
        "model.layers.{}.self_attn",
        {"q_proj.weight": Q, "q_proj.bias": Q, "k_proj.weight": K, "k_proj.bias": K},
        ("half", 16),
    ),
    "qwen3": (
        [0, 1, 2, 3],
        "model.layers.{}.self_attn",
        {"q_proj.weight": Q, "k_proj.weight": K, **SHARED_GAINS},
        ("half", 16),
    ),
    "qwen3_next": (
        [3],
        "model.layers.{}.self_attn",
        {"q_proj.weight": rows("q", 4, 0, 32), "k_proj.weight": K, **SHARED_GAINS},  # query, gate, query, gate, ...
        ("half", 4),
    ),
    "qwen3_5_text": (
        [3],
        "model.layers.{}.self_attn",
        {"q_proj.weight": rows("q", 4, 0, 32), "k_proj.weight": K, **SHARED_GAINS},
        ("half", 4),
    ),
    "minimax": ([1, 3], "model.layers.{}.self_attn", {"q_proj.weight": Q, "k_proj.weight": K}, ("half", 16)),
    "olmo_hybrid": (
        [3],
        "model.layers.{}.self_attn",
        {"q_proj.weight": Q, "k_proj.weight": K, **OWN_GAINS},
        ("half", 16),
    ),
    "granitemoehybrid": ([3], "model.layers.{}.self_attn", {"q_proj.weight": Q, "k_proj.weight": K}, ("none", 0)),
    "gpt_neox": (
        [0, 1, 2, 3],
        "gpt_neox.layers.{}.attention",
        {"query_key_value.weight": PER_HEAD, "query_key_value.bias": PER_HEAD},
        ("half", 4),
    ),
    "gpt2": ([0, 1, 2, 3], "transformer.h.{}.attn", {"c_attn.weight": FUSED, "c_attn.bias": FUSED}, ("none", 0)),
    "phi3": (
        [0, 1, 2, 3],
        "model.layers.{}.self_attn",
        {"qkv_proj.weight": Q + rows("k", KEY_HEADS, 64)},
        ("half", 16),
    ),
}


@pytest.mark.parametrize("model_type", sorted(EXPECTED))
def test_row_maps(model_type: str) -> None:
    layers, module, wanted, (rotary, channels) = EXPECTED[model_type]
    model = zoo.tiny_model(model_type)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    specs = find_attention(model)
    assert [spec.layer for spec in specs] == layers
    for spec in specs:
        assert spec.module == module.format(spec.layer)
        found = {param.name.removeprefix(spec.module + "."): param for param in spec.params}
        assert {name: list(param.blocks) for name, param in found.items()} == wanted
        for name, param in found.items():
            assert param.shape == shapes[param.name]
            assert param.dim == (1 if (model_type, name) == ("gpt2", "c_attn.weight") else 0)
            assert param.kind == ("norm" if "norm" in name else name.rpartition(".")[2])
        assert (spec.rotary, spec.rotary_dim) == (rotary, channels)
        assert (spec.num_heads, spec.head_dim) == (QUERY_HEADS, HEAD)
        assert spec.num_kv_heads == (4 if model_type in ("gpt_neox", "gpt2") else KEY_HEADS)
        assert not spec.notes


@pytest.mark.parametrize("model_type", sorted(EXPECTED))
def test_each_block_moves_its_own_head(model_type: str) -> None:
    """Heads, one at a time, on the model's own attention; whole-width norms (OLMo) let the others move along."""
    model = zoo.tiny_model(model_type, zoo.ORACLE)
    params, modules = dict(model.named_parameters()), dict(model.named_modules())
    attentions = zoo.Attentions(model)
    spec = find_attention(model)[0]
    before = attentions.again(modules[spec.module])
    for param in spec.params:
        for block in param.blocks:
            if block.head is None or (param.kind == "norm" and model_type != "olmo_hybrid"):
                continue
            with zoo.changed(params, {param.name: (param.dim, list(range(block.start, block.stop)))}):
                after = attentions.again(modules[spec.module])
            at = "qk".index(block.role)
            moved = (before[at] != after[at]).any(-1).any(-1)[0].nonzero().flatten().tolist()
            assert block.head in moved
            assert moved == [block.head] or model_type == "olmo_hybrid"


def find(model_type: str, **overrides: Any) -> list[AttentionSpec]:
    config = zoo.tiny_config(model_type, **overrides)
    specs = find_attention(config)
    assert all(verdict.ok for verdict in prove_layout(config, specs))
    return specs


def blocks_of(spec: AttentionSpec, ending: str) -> list[Block]:
    return list(next(param for param in spec.params if param.name.endswith(ending)).blocks)


GROUPED = [*rows("q", 2), *rows("k", 1, 32), *rows("q", 2, 64), *rows("k", 1, 96)]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, [(0, 0), (1, 1), (4, 2), (5, 3)]),
        ({"new_decoder_architecture": False, "multi_query": True}, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (
            {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4},
            [(0, 0), (3, 1), (6, 2), (9, 3)],
        ),
        (
            {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4, "alibi": True, "bias": True},
            [(0, 0), (3, 1), (6, 2), (9, 3)],
        ),
    ],
)
def test_falcons_layouts(overrides: dict[str, Any], wanted: list[tuple[int, int]]) -> None:
    """Queries by groups, all queries before one key, head after head: (16-row place, head) of the queries."""
    spec = find("falcon", **overrides)[0]
    blocks = blocks_of(spec, "query_key_value.weight")
    assert [(b.start // HEAD, b.head) for b in blocks if b.role == "q"] == wanted
    places = {2: [(2, 0), (6, 1)], 1: [(4, 0)], 4: [(1, 0), (4, 1), (7, 2), (10, 3)]}[spec.num_kv_heads]
    assert [(b.start // HEAD, b.head) for b in blocks if b.role == "k"] == places
    assert all(b.stop - b.start == HEAD for b in blocks)
    assert spec.rotary == ("none" if overrides.get("alibi") else "half")


def test_bigcodes_layouts() -> None:
    one, many = find("gpt_bigcode", multi_query=True)[0], find("gpt_bigcode", multi_query=False)[0]
    assert blocks_of(one, "c_attn.weight") == rows("q", 4) + rows("k", 1, 64)
    assert blocks_of(many, "c_attn.weight") == PER_HEAD
    assert (one.num_kv_heads, many.num_kv_heads) == (1, 4)


def test_latent_attention_with_and_without_a_query_latent() -> None:
    """MLA: 16 unrotated and 8 rotated channels a head; the key-value latent (24 rows) feeds keys and values alike."""
    for rank in (32, None):
        for spec in find("deepseek_v3", q_lora_rank=rank):
            queries = [Block(24 * h, 24 * h + 24, "q", h) for h in range(4)]
            assert blocks_of(spec, "q_b_proj.weight" if rank else "q_proj.weight") == queries
            assert blocks_of(spec, "kv_a_proj_with_mqa.weight") == [Block(0, 24, "kv"), Block(24, 32, "k")]
            assert blocks_of(spec, "kv_b_proj.weight") == [Block(36 * h, 36 * h + 16, "k", h) for h in range(4)]
            assert (spec.rotary, spec.rotary_dim, spec.head_dim) == ("interleaved", 8, 24)
            assert "keys and values alike" in spec.notes[0]
            if rank:
                assert blocks_of(spec, "q_a_proj.weight") == [Block(0, 32, "q")]


def test_keys_that_are_the_values_too() -> None:
    sliding, full, *_ = find("gemma4_text", attention_k_eq_v=True)
    assert blocks_of(sliding, "k_proj.weight") == K
    assert blocks_of(full, "k_proj.weight") == [Block(0, 64, "kv")]


def test_classes_that_unsloth_has_put_into_a_models_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run on a GPU alone; what they stand in place of is kept in the file."""
    from transformers.models.qwen2 import modeling_qwen2 as file

    class OnGPU(file.Qwen2RotaryEmbedding):
        def forward(self, *args: Any, **options: Any) -> None:
            raise RuntimeError("no GPU")

    expected, original = find("qwen2"), file.Qwen2RotaryEmbedding
    monkeypatch.setattr(file, "Qwen2RotaryEmbedding", OnGPU)
    with pytest.raises(UnknownLayoutError, match="no GPU"):
        find("qwen2")
    kept = ({"Qwen2RotaryEmbedding": original}, {})
    monkeypatch.setattr(file, "_unsloth_pre_patch_originals", kept, raising=False)
    assert find("qwen2") == expected
    assert file.Qwen2RotaryEmbedding is OnGPU


def test_layers_that_borrow_their_keys() -> None:
    specs = find("gemma3n_text")
    assert [any("k_proj" in param.name for param in spec.params) for spec in specs] == [True, True, False, False]
    assert [bool(spec.notes) for spec in specs] == [False, False, True, True]
    assert all(blocks_of(spec, "q_proj.weight") == Q for spec in specs)


def test_sliding_window_mixes() -> None:
    mixed = find("qwen2", use_sliding_window=True, max_window_layers=2)
    assert [spec.sliding for spec in mixed] == [False, False, True, True]
    assert [spec.sliding for spec in find("gpt_neo")] == [False, True, False, True]
    assert all(spec.sliding for spec in find("mistral", sliding_window=8))


def test_clipping_hides_no_rows() -> None:
    """At 0.01 nearly every query is clipped, and its gradient gone."""
    assert blocks_of(find("olmo", clip_qkv=0.01)[0], "q_proj.weight") == Q


def test_gains_of_two_dimensions_are_norms() -> None:
    kinds = {
        param.name.rpartition("self_attn.")[2]: param.kind for param in find("cohere", use_qk_norm=True)[0].params
    }
    assert kinds == {
        "q_proj.weight": "weight",
        "k_proj.weight": "weight",
        "q_norm.weight": "norm",
        "k_norm.weight": "norm",
    }


def test_modules_under_several_names() -> None:
    """Zamba runs one attention in three layers; Zamba-2 two, each with adapters of its own."""
    assert [spec.layer for spec in find("zamba")] == [2]
    names = [{param.name for param in spec.params} for spec in find("zamba2")]
    assert len(names) == 3 and names[0] & names[2] and names[2] - names[0]


class TestNothingElseIsTouched:
    """Discovery looks at a copy of its own."""

    def test_model_config_and_process(self) -> None:
        model = zoo.tiny_model("qwen3_next").train()
        config = copy.deepcopy(model.config.to_dict())
        attention = model.config._attn_implementation
        weights = {name: (param.data_ptr(), param.clone()) for name, param in model.named_parameters()}
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        functions = dict(AttentionInterface._global_mapping)
        dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
        Distribution.set_default_validate_args(__debug__)  # torch.compile in an earlier test turns it off
        find_attention(model)
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])
        assert model.config.to_dict() == config and model.config._attn_implementation == attention
        assert dict(AttentionInterface._global_mapping) == functions
        assert (torch.get_default_dtype(), torch.get_num_threads()) == (dtype, threads)
        assert Distribution._validate_args is __debug__
        assert model.training and all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
        for name, param in model.named_parameters():
            assert param.data_ptr() == weights[name][0] and torch.equal(param, weights[name][1])

    def test_after_a_refusal(self) -> None:
        functions = dict(AttentionInterface._global_mapping)
        state = torch.get_rng_state()
        with pytest.raises(UnknownLayoutError):
            find_attention(zoo.tiny_config("reformer"))
        assert dict(AttentionInterface._global_mapping) == functions
        assert torch.equal(torch.get_rng_state(), state)

    def test_it_never_forwards_the_live_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = zoo.tiny_model("llama")

        def fail(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("the live model was run")

        for module in model.modules():
            monkeypatch.setattr(module, "forward", fail)
        assert len(find_attention(model)) == 4


def test_it_gives_the_same_every_time() -> None:
    config = zoo.tiny_config("olmo_hybrid")
    first = find_attention(config)
    torch.manual_seed(1234)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert find_attention(config) == first
    finally:
        torch.set_num_threads(threads)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert find_attention(config) == first
    torch.set_default_dtype(torch.float64)
    try:
        assert find_attention(config) == first
    finally:
        torch.set_default_dtype(torch.float32)


class TestWrappedModels:
    def test_compiled(self) -> None:
        model = torch.compile(zoo.tiny_model("llama"))
        names = {param.name for spec in find_attention(model) for param in spec.params}
        assert names <= dict(model.named_parameters()).keys() and all("_orig_mod" in name for name in names)

    def test_peft(self) -> None:
        from peft import LoraConfig, get_peft_model

        base = zoo.tiny_model("gpt_neox")
        model = get_peft_model(base, LoraConfig(target_modules=["query_key_value"], r=2))
        params = dict(model.named_parameters())
        spec = find_attention(model)[0]
        weight = next(param for param in spec.params if param.kind == "weight")
        assert weight.name == "base_model.model.gpt_neox.layers.0.attention.query_key_value.base_layer.weight"
        assert tuple(params[weight.name].shape) == weight.shape and list(weight.blocks) == PER_HEAD
        keys = {
            f"gpt_neox.layers.0.attention.query_key_value.{part}": tuple(weight.shape[:n])
            for part, n in (("weight", 2), ("bias", 1))
        }
        assert disk_names([weight], keys, model) == {weight.name: "gpt_neox.layers.0.attention.query_key_value.weight"}

    def test_partitioned(self) -> None:
        """ZeRO-3 leaves parameters empty and keeps their shape in `ds_shape`."""
        model = zoo.tiny_model("llama")
        plain = find_attention(model)
        for param in model.parameters():
            param.ds_shape = param.shape
            param.data = torch.empty(0)
        assert find_attention(model) == plain

    def test_a_model_that_its_config_does_not_describe(self) -> None:
        model = zoo.tiny_model("llama")
        model.model.layers[1].self_attn.q_proj = nn.Linear(HIDDEN, 32, bias=False)
        with pytest.raises(UnknownLayoutError, match=r"layers\.1\.self_attn\.q_proj\.weight.*\(64, 64\).*\(32, 64\)"):
            find_attention(model)
        del model.model.layers[1]
        with pytest.raises(UnknownLayoutError, match="which the model does not have"):
            find_attention(model)


class TestProof:
    def test_right(self) -> None:
        verdicts = prove_layout(zoo.tiny_config("deepseek_v3"))
        assert [(v.ok, v.layers) for v in verdicts] == [(True, [0, 1, 2, 3])]
        assert "keys and values alike" in verdicts[0].partial[0]

    @pytest.mark.parametrize(
        ("model_type", "blocks", "says"),
        [
            ("llama", [*Q[:3], Block(48, 64, "k", 3)], "rows said to feed k move"),
            ("llama", [*Q[:3], Block(48, 63, "q", 3)], "depend on rows not mapped"),
            ("qwen3_next", [Block(0, 17, "q", 0), *rows("q", 4, 0, 32)[1:]], "last row is idle"),
            ("qwen3_next", [Block(0, 128, "q")], "last row is idle"),
            ("deepseek_v3", [Block(0, 24, "k"), Block(24, 32, "k")], "rows said to feed k move kv"),
        ],
    )
    def test_wrong(self, model_type: str, blocks: list[Block], says: str) -> None:
        config = zoo.tiny_config(model_type)
        name = "kv_a_proj_with_mqa.weight" if model_type == "deepseek_v3" else "q_proj.weight"
        specs = [replaced(spec, name, blocks) for spec in find_attention(config)]
        verdicts = prove_layout(config, specs)
        assert any(says in problem for verdict in verdicts for problem in verdict.problems), verdicts

    def test_a_module_that_does_not_attend(self) -> None:
        config = zoo.tiny_config("qwen3_next")
        spec = replace(find_attention(config)[0], module="model.layers.0.linear_attn", layer=0)
        with pytest.raises(UnknownLayoutError, match=r"model\.layers\.0\.linear_attn .* does not attend"):
            prove_layout(config, [spec])


def replaced(spec: AttentionSpec, name: str, blocks: list[Block]) -> AttentionSpec:
    params = [replace(p, blocks=tuple(blocks)) if p.name.endswith(name) else p for p in spec.params]
    return replace(spec, params=tuple(params))


class TestRefusals:
    def test_layer_types_that_disagree(self) -> None:
        """A config that calls a layer linear where softmax attention runs, and the other way round."""
        model = zoo.tiny_model("llama")
        model.config.layer_types = ["full_attention", "linear_attention", "full_attention", "full_attention"]
        with pytest.raises(
            UnknownLayoutError, match=r"Layer 1 is 'linear_attention'.*seen there.*seen in layers 0, 1, 2, 3"
        ):
            find_attention(model)

    def test_no_such_place(self, tmp_path: Path) -> None:
        with pytest.raises(QKGuardError, match=r"config\.json does not exist"):
            find_attention(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(QKGuardError, match="not valid JSON"):
            find_attention(tmp_path / "config.json")
        with pytest.raises(QKGuardError, match="found int"):
            find_attention(3)

    def test_a_model_without_config(self) -> None:
        with pytest.raises(UnknownLayoutError, match=r"Linear is not a transformers model.*spec=FILE"):
            find_attention(nn.Linear(2, 2))

    def test_remote_code(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Refused with the ways out; found by behaviour like any other once it is trusted."""
        config = zoo.tiny_config("qwen3").to_dict() | {
            "model_type": "elsewhere",
            "architectures": ["ElsewhereForCausalLM"],
        }
        config["auto_map"] = {
            "AutoConfig": "theirs.ElsewhereConfig",
            "AutoModelForCausalLM": "theirs.ElsewhereForCausalLM",
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "theirs.py").write_text(REMOTE)
        with pytest.raises(UnknownLayoutError, match=r"trust-remote-code.*--spec FILE"):
            find_attention(tmp_path)
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
        specs = find_attention(tmp_path, trust_remote_code=True)
        assert [blocks_of(spec, "q_proj.weight") for spec in specs] == [Q] * 4


REMOTE = """
from transformers import Qwen3Config, Qwen3ForCausalLM


class ElsewhereConfig(Qwen3Config):
    model_type = "elsewhere"


class ElsewhereForCausalLM(Qwen3ForCausalLM):
    config_class = ElsewhereConfig
"""


class TestDiskNames:
    def test_renamed_on_load(self) -> None:
        config = zoo.tiny_config("nemotron_h")
        specs = find_attention(config)
        keys = {p.name.replace("model.", "backbone.", 1): p.shape for s in specs for p in s.params}
        names = disk_names(specs, keys, config)
        assert names == {key.replace("backbone.", "model.", 1): key for key in keys}

    def test_a_base_model_and_the_same_with_a_head(self) -> None:
        config = zoo.tiny_config("llama")
        specs = find_attention(config)
        bare = {p.name.removeprefix("model."): p.shape for s in specs for p in s.params}
        assert disk_names(specs, bare, config) == {f"model.{key}": key for key in bare}

    def test_compiled_models_save_their_prefix(self) -> None:
        model = torch.compile(zoo.tiny_model("llama"))
        specs = find_attention(model)
        keys = {p.name: p.shape for s in specs for p in s.params}
        assert all(key.startswith("_orig_mod.") for key in keys)
        assert disk_names(specs, keys, model) == {key: key for key in keys}

    def test_uncertain_names_are_refused(self) -> None:
        config = zoo.tiny_config("llama")
        param = find_attention(config)[0].params[0]
        with pytest.raises(QKGuardError, match="None of the checkpoint's 1 tensors loads as"):
            disk_names([param], {"model.norm.weight": (64,)}, config)
        with pytest.raises(QKGuardError, match=r"the file has shape \(64, 32\)"):
            disk_names([param], {param.name: (64, 32)}, config)
        both = {param.name: param.shape, param.name.removeprefix("model."): param.shape}
        with pytest.raises(QKGuardError, match="several tensors"):
            disk_names([param], both, config)

    def test_fused_on_disk(self) -> None:
        config = zoo.tiny_config("hrm_text")
        param = find_attention(config)[0].params[0]
        key = param.name.rpartition("self_attn.")[0] + "attn.gqkv_proj.weight"
        with pytest.raises(QKGuardError, match=r"cuts it out of .*gqkv_proj\.weight"):
            disk_names([param], {key: (256, 64)}, config)


HYPENET = {
    "model_type": "hypenet",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attn_use_rope": False,
    "mixer_types": ["lightning-attn", "attn", "lightning-attn", "attn"],
    "architectures": ["HypeNetForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_hypenet.HypeNetConfig"},
}
JET_NEMOTRON = {
    "model_type": "jet_nemotron",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["jet", "attn", "jet", "swa"],
    "architectures": ["JetNemotronForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_jet_nemotron.JetNemotronConfig"},
}


class TestThePapersModels:
    """By rule: their code is not imported. Tensor names and shapes as in their repositories."""

    @pytest.mark.parametrize("config", [HYPENET, JET_NEMOTRON], ids=["hypenet", "jet_nemotron"])
    def test_softmax_layers_only(self, config: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        specs = find_attention(tmp_path)
        assert [spec.layer for spec in specs] == [1, 3]
        hyper = config is HYPENET
        wanted = {"q_proj.weight": Q, "k_proj.weight": K}
        wanted |= SHARED_GAINS if hyper else {"q_proj.bias": Q, "k_proj.bias": K}
        for spec in specs:
            assert spec.module == f"model.layers.{spec.layer}.self_attn"
            found = {param.name.removeprefix(spec.module + "."): list(param.blocks) for param in spec.params}
            assert found == wanted
            assert (spec.rotary, spec.rotary_dim) == (("none", 0) if hyper else ("half", 16))
        assert [spec.sliding for spec in specs] == [False, not hyper]
        # a state dict by hand; the linear layers own projections of the same names
        keys: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, 64), "model.norm.weight": (64,)}
        for i in range(4):
            prefix = f"model.layers.{i}.self_attn"
            keys |= {f"{prefix}.{x}_proj.weight": (64 if x in "qo" or i in (0, 2) else 32, 64) for x in "qkvo"}
            keys |= {f"{prefix}.{x}_norm.weight": (16,) for x in "qk"} if hyper else {}
            keys |= {} if hyper else {f"{prefix}.{x}_proj.bias": (64 if x == "q" else 32,) for x in "qkv"}
        names = disk_names(specs, keys, tmp_path)
        assert names == {param.name: param.name for spec in specs for param in spec.params}
        keys["model.layers.1.self_attn.k_proj.weight"] = (64, 64)
        with pytest.raises(QKGuardError, match=r"shape \(64, 64\)"):
            disk_names(specs, keys, tmp_path)

    def test_unknown_mixers_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(HYPENET | {"mixer_types": ["attn", "rwkv9", "attn", "attn"]}))
        with pytest.raises(UnknownLayoutError, match="rwkv9"):
            find_attention(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(HYPENET | {"num_hidden_layers": 5}))
        with pytest.raises(UnknownLayoutError, match="4 entries for 5 layers"):
            find_attention(tmp_path)


REAL = """
import re, time
from pathlib import Path
from transformers import DeepseekV3Config, LlamaConfig, Qwen3NextConfig
from qkguard.layout import find_attention

dense = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                    num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072)
hybrid = Qwen3NextConfig(hidden_size=2048, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=2,
                         head_dim=256, num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512,
                         shared_expert_intermediate_size=512, linear_num_value_heads=32, vocab_size=151936)
latent = DeepseekV3Config()
out = []
for config in (dense, hybrid, latent):
    start = time.process_time()
    specs = find_attention(config)
    seconds = time.process_time() - start
    numel = sum(p.numel for s in specs for p in s.params if p.kind == "weight")
    out.append((len(specs), numel, seconds, specs[-1].layer, specs[-1].head_dim))
# ru_maxrss would count what the tests' own process held when it started this one
print(out, 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)))
"""


def test_real_sizes() -> None:
    """A dense 70B, an 80B hybrid and a 671B MLA, from their published numbers: right sizes, in seconds, under 2 GB.

    The counts are worked out by hand: layers x (query + key rows) x inputs.
    """
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, timeout=300, check=True)
    results, peak = done.stdout.strip().rsplit(" ", 1)
    dense, hybrid, latent = eval(results)
    assert dense[:2] == (80, 80 * (64 + 8) * 128 * 8192)
    assert hybrid[:2] == (12, 12 * (16 + 2) * 256 * 2048)
    assert latent[:2] == (61, 61 * (1536 * 7168 + 128 * 192 * 1536 + (512 + 64) * 7168 + 128 * 128 * 512))
    assert [result[3:] for result in (dense, hybrid, latent)] == [(79, 128), (47, 256), (60, 192)]
    assert max(result[2] for result in (dense, hybrid, latent)) < 30, results  # 2 to 4 s on an idle core
    assert int(peak) < 2e9


def test_specs_by_hand_are_taken_as_they_are() -> None:
    model = zoo.tiny_model("llama")
    param = ParamMap("model.layers.2.self_attn.q_proj.weight", (64, 64), 0, "weight", (Block(0, 16, "q", 0),))
    spec = AttentionSpec(2, "model.layers.2.self_attn", "full_attention", 4, 2, 16, (param,))
    assert find_attention(model, spec=[spec]) == [spec]
    with pytest.raises(UnknownLayoutError, match=r"says shape \(65, 64\)"):
        find_attention(model, spec=[replace(spec, params=(replace(param, shape=(65, 64)),))])
