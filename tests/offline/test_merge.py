"""Merging adapters offline: bits of PEFT's own merge everywhere but in queries and keys, which are the base's."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qkguard import QKGuardError, verify
from qkguard.adapters.files import open_adapter
from qkguard.adapters.meta_model import MetaPeftModel
from qkguard.checkpoint import copying
from qkguard.offline import merge_plan
from qkguard.offline.merge import merge_adapter
from tests.support import judge, oracle
from tests.support.lora import LINEAR, expected_merge, peft_merge, save_adapter
from tests.support.models import tiny_model

FUSED = {"phi3": ["qkv_proj", "o_proj"], "gpt_neox": ["query_key_value", "dense"], "gpt2": ["c_attn", "c_proj"]}
PATTERNS = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 3}, "layers_to_transform": [1, 3]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": LINEAR}),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "rslora, biases": ("qwen2", {"target_modules": LINEAR[:3], "use_rslora": True, "lora_bias": True}),
    "patterns": ("llama", {"target_modules": LINEAR} | PATTERNS),
    "hybrid": ("minimax", {"target_modules": LINEAR}),
    "hybrid, gated queries": ("qwen3_next", {"target_modules": [*LINEAR, "in_proj_qkvz", "out_proj"]}),
    "all linear layers": ("qwen3_5_text", {"target_modules": "all-linear"}),
    "hybrid, dora": ("qwen3_next", {"target_modules": LINEAR, "use_dora": True}),
    "fused": ("phi3", {"target_modules": FUSED["phi3"]}),
    "fused, dora": ("phi3", {"target_modules": FUSED["phi3"], "use_dora": True}),
    "fused by head": ("gpt_neox", {"target_modules": FUSED["gpt_neox"]}),
    "transposed": ("gpt2", {"target_modules": FUSED["gpt2"], "fan_in_fan_out": True}),
    "transposed, dora": ("gpt2", {"target_modules": FUSED["gpt2"], "fan_in_fan_out": True, "use_dora": True}),
    "modules_to_save": ("llama", {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tokens": ("llama", {"target_modules": LINEAR, "trainable_token_indices": [3, 7]}),
}  # fmt: skip
TIED: dict[str, dict[str, Any]] = {
    "embedding adapter": {"target_modules": [*LINEAR, "embed_tokens"]},
    "embedding dora": {"target_modules": [*LINEAR, "embed_tokens"], "use_dora": True},
    "head adapter": {"target_modules": [*LINEAR, "lm_head"]},
    "tokens": {"target_modules": LINEAR, "trainable_token_indices": [3, 7]},
    "embedding saved": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]},
    "head saved": {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
}


def save_base(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, shard: str = "60KB", **options: Any
) -> Path:
    tiny_model(name, dtype=dtype, **options).save_pretrained(folder, max_shard_size=shard)  # type: ignore[operator]
    return folder


def check(name: str, base: Path, adapter: Path, folder: Path) -> dict[str, Any]:
    """Both merges against PEFT's, the restored one verified and loaded; the manifest is returned."""
    peft = peft_merge(base, adapter, folder / "peft")
    merge_adapter(base, adapter, folder / "whole", keep_qk=True)
    assert not (wrong := oracle.differences(oracle.load_folder(folder / "whole"), peft)), wrong
    manifest = merge_adapter(base, adapter, folder / "out")
    wanted = expected_merge(name, base, peft)
    assert not (wrong := oracle.differences(oracle.load_folder(folder / "out"), wanted)), wrong
    assert oracle.differences(wanted, oracle.load_folder(base)), "a copy of the base would pass"
    verify(folder / "out", full=True)
    for part in ("whole", "out"):
        _, info = AutoModelForCausalLM.from_pretrained(folder / part, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
    return manifest


@pytest.mark.parametrize("case", CASES)
def test_merge_is_pefts_but_for_queries_and_keys(tmp_path, case):
    name, config = CASES[case]
    dtype = torch.bfloat16 if "dora" in case or "fused" in case else torch.float32
    base = save_base(tmp_path / "base", name, dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **config)
    manifest = check(name, base, adapter, tmp_path)
    assert all(layer["drift"]["q_rel"] > 1e-3 for layer in manifest["layers"] if layer["adapted"])
    assert any(layer["adapted"] for layer in manifest["layers"])


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_tied_embeddings(tmp_path, case, shard):
    base = save_base(tmp_path / "base", "llama", shard=shard, tie_word_embeddings=True)
    adapter = save_adapter(base, tmp_path / "adapter", **TIED[case])
    manifest = check("llama", base, adapter, tmp_path)
    tied = json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    peft = json.loads((tmp_path / "peft/config.json").read_text())["tie_word_embeddings"]
    assert tied == peft == ("saved" not in case)
    assert any("no longer tied" in w for w in manifest["warnings"]) == ("saved" in case)
    token = torch.arange(8)[None]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / p)(token).logits for p in ("whole", "peft"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", ["lora", "fused", "dora", "fused, dora"])
def test_alpha_scales_the_adapters_of_queries_and_keys(tmp_path, case):
    name, config = CASES[case]
    base = save_base(tmp_path / "base", name)
    adapter = save_adapter(base, tmp_path / "adapter", **config)
    for alpha, other in ((1.0, {}), (0.0, {"keep_qk": True})):
        merge_adapter(base, adapter, tmp_path / f"{alpha}", alpha=alpha)
        merge_adapter(base, adapter, tmp_path / f"same{alpha}", **other)
        left, right = (oracle.load_folder(tmp_path / f"{p}{alpha}") for p in ("", "same"))
        assert not oracle.differences(left, right)
    manifest = merge_adapter(base, adapter, tmp_path / "out", alpha=0.25)
    assert manifest["method"]["alpha"] == 0.25
    before, whole, out = (oracle.load_folder(tmp_path / p) for p in ("base", "same0.0", "out"))
    qk = set(oracle.differences(oracle.expected(name, before, whole), whole))
    assert qk and not set(oracle.differences(out, whole)) - qk, "values and the rest are PEFT's"
    for key in qk:
        dim, ranges = next(rows for pattern, rows in oracle.ROWS[name].items() if re.search(pattern, key))
        for lo, hi in ranges or [(0, whole[key].shape[dim])]:
            b, w, o = (t[key].narrow(dim, lo, hi - lo).double() for t in (before, whole, out))
            assert torch.allclose(o, b + 0.75 * (w - b), rtol=0, atol=1e-7) and not torch.allclose(o, w, atol=1e-5)
        for lo, hi in _others(ranges, whole[key].shape[dim]):
            assert oracle.same_bits(out[key].narrow(dim, lo, hi - lo), whole[key].narrow(dim, lo, hi - lo))


def _others(ranges: list[tuple[int, int]] | None, size: int) -> list[tuple[int, int]]:
    bounds = [0, *(edge for pair in ranges or [(0, size)] for edge in pair), size]
    return [(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if a < b]


@pytest.mark.parametrize("keep_qk", [True, False])
def test_tensors_are_merged_side_by_side_and_never_copied(
    tmp_path: Path, keep_qk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at a time or one by one: the same files. Of the base, what is overwritten whole is not copied first."""
    base = save_base(tmp_path / "base", "llama", torch.bfloat16, shard="5GB")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    tensors = load_file(base / "model.safetensors")
    kept = () if keep_qk else ("q_proj.weight", "k_proj.weight")
    merged = tuple({".".join(name.split(".")[-2:]) for name in tensors if "proj" in name} - set(kept))
    copied: list[int] = []
    real = copying.copy_range

    def counted(src: int, dst: int, start: int, stop: int, *tell: Any) -> None:
        copied.append(stop - start)
        real(src, dst, start, stop, *tell)

    monkeypatch.setattr(copying, "copy_range", counted)
    monkeypatch.setattr(copying, "_clone", lambda src, dst: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    done: list[tuple[int, int]] = []

    def progress(*at: int) -> None:
        done.append((at[0], at[1]))

    found = {}
    for most in (4, 1):
        monkeypatch.setattr(merge_plan, "MOST_AT_ONCE", most)
        done.clear()
        manifest = merge_adapter(base, adapter, tmp_path / f"{most}", keep_qk=keep_qk, progress=progress)
        del manifest["created"]
        found[most] = manifest, (tmp_path / f"{most}/model.safetensors").read_bytes()
        assert done == sorted(done) and done[-1][0] == done[-1][1] == len(found[most][1])
        overwritten = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(merged))
        assert 0 < sum(copied) - (len(found[most][1]) - overwritten) < 4000, "and the configs"
        copied.clear()
    assert found[4] == found[1]
    merge_adapter(base, adapter, tmp_path / "other", keep_qk=not keep_qk)
    assert (tmp_path / "other/model.safetensors").read_bytes() != found[1][1]


def test_one_module_works_for_one_parameter_at_a_time(tmp_path: Path) -> None:
    """Its weight's and its bias's steps change the same tables of PEFT's; another module's do not."""
    base = save_base(tmp_path / "base", "qwen2")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=LINEAR[:3], lora_bias=True)
    model = MetaPeftModel(base, open_adapter(adapter))
    params = {param.name: param for param in model.adapted}
    parts = ("q_proj.weight", "q_proj.bias", "k_proj.weight")
    weight, bias, other = (params[f"model.layers.0.self_attn.{part}"] for part in parts)
    values = oracle.load_folder(base)
    with ThreadPoolExecutor(2) as pool:
        with weight.steps[0].lock:
            waits = pool.submit(model.merged, bias, values[bias.name])
            assert pool.submit(model.merged, other, values[other.name]).result(30) is not None
            assert not waits.done()
        assert not torch.equal(waits.result(30), values[bias.name])


def edited(adapter: Path, **config: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def resaved(adapter: Path, change: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
STRAY = FIRST.replace("q_proj", "x_proj")
REFUSED: dict[str, tuple[Any, str]] = {
    "another method": (lambda a: edited(a, peft_type="LOHA"), "LOHA"),
    "fused experts": (lambda a: edited(a, target_parameters=["experts.gate_up_proj"]), "target_parameters"),
    "biases": (lambda a: edited(a, bias="all"), "bias='all'"),
    "residual base": (lambda a: edited(a, init_lora_weights="pissa"), "pissa"),
    "empty tensor": (lambda a: resaved(a, lambda t: t.update({FIRST: torch.empty(0)})), "empty or were cut"),
    "flat tensor": (lambda a: resaved(a, lambda t: t.update({FIRST: t[FIRST].flatten()})), "empty or were cut"),
    "no tensors": (lambda a: resaved(a, lambda t: t.clear()), "no tensors"),
    "lost tensor": (lambda a: resaved(a, lambda t: t.pop(FIRST)), "lacks"),
    "stray tensor": (lambda a: resaved(a, lambda t: t.update({STRAY: t[FIRST].clone()})), "x_proj"),
    "another rank": (lambda a: edited(a, r=8), "does not fit"),
    "NaN": (lambda a: resaved(a, lambda t: t[FIRST.replace("q_proj", "v_proj")].fill_(float("nan"))), "NaN"),
    "no adapter": (lambda a: (a / "adapter_config.json").unlink(), "not a PEFT adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(tmp_path, case):
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    damage, message = REFUSED[case]
    damage(adapter)
    with pytest.raises(QKGuardError, match=message):
        merge_adapter(base, adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"], "something was left behind"


def test_an_adapter_of_another_base_is_refused(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    with pytest.raises(QKGuardError, match=r"[Ee]xpected the base model it was trained on"):
        merge_adapter(save_base(tmp_path / "wide", "llama", hidden_size=32), adapter, tmp_path / "out")
    with pytest.raises(QKGuardError, match="choose one"):
        merge_adapter(base, adapter, tmp_path / "out", keep_qk=True, alpha=0.5)
    manifest = merge_adapter(save_base(tmp_path / "again", "llama"), adapter, tmp_path / "out")
    assert any("names base as its base; it was merged onto again" in w for w in manifest["warnings"])


def test_tokenizer_and_template_of_training_win_and_the_card_tells(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    (base / "chat_template.jinja").write_text("base")
    (adapter / "chat_template.jinja").write_text("tuned")
    (adapter / "training_args.bin").write_bytes(b"x")
    manifest = merge_adapter(base, adapter, tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "tuned"
    assert not (tmp_path / "out/training_args.bin").exists() and not (tmp_path / "out/adapter_config.json").exists()
    judge.no_private_paths(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "`adapter` was merged into the base model `base`" in card and "bit for bit the base model's" in card
    assert manifest["adapter"]["base"] == "base" and len(manifest["layers"]) == 4
    data = bytearray((file := next((tmp_path / "out").glob("*-of-*.safetensors"))).read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)
    with pytest.raises(QKGuardError, match=str(file.name)):
        verify(tmp_path / "out")
