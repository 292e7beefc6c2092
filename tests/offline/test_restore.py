"""Restored folders of real architectures, checked tensor by tensor and through from_pretrained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkguard.errors import QKGuardError
from qkguard.offline.restore import restore_checkpoint
from qkguard.offline.verify import verify
from tests.support.models import CONFIGS, noised, save_pair, tiny_model
from tests.support.oracle import differences, expected, load_folder


@pytest.mark.parametrize("name", CONFIGS)
def test_only_queries_and_keys_change(name: str, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, name, dtype=torch.bfloat16, shard="60KB")
    manifest = restore_checkpoint(base, tuned, tmp_path / "out")
    wanted = expected(name, load_folder(base), load_folder(tuned))
    found = load_folder(tmp_path / "out")
    assert differences(found, wanted) == []
    assert {"linked", "patched"} == {file["made"] for file in manifest["files"].values()}
    verify(tmp_path / "out", full=True)

    # the twin: one row in another place is seen
    victim = manifest["tensors"][0]["name"]
    found[victim] = found[victim].roll(1, 0)
    assert differences(found, wanted) == [victim]


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "gpt2", "minimax"])
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_restored_folder_loads(name: str, shard: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, tuned = save_pair(tmp_path, name, shard=shard)
    restore_checkpoint(base, tuned, tmp_path / "out")
    models = {}
    for folder in (base, tuned, tmp_path / "out"):
        models[folder.name], info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
    wanted = expected(name, models["base"].state_dict(), models["tuned"].state_dict())
    assert differences(models["out"].state_dict(), wanted) == []
    tokens = torch.arange(12).view(1, -1) % 7 + 3
    logits = {key: model.eval()(tokens).logits for key, model in models.items()}
    assert not torch.equal(logits["out"], logits["tuned"])
    assert not torch.equal(logits["out"], logits["base"])


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tied: bool, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", tie_word_embeddings=tied)
    assert ("lm_head.weight" in load_folder(tuned)) is not tied
    restore_checkpoint(base, tuned, tmp_path / "out")
    assert differences(load_folder(tmp_path / "out"), expected("llama", load_folder(base), load_folder(tuned))) == []


def test_tied_embeddings_written_twice_in_the_tuned_files(tmp_path: Path) -> None:
    """DeepSpeed's ZeRO-2 also saves the tied lm_head."""
    base, tuned = save_pair(tmp_path, "llama", tie_word_embeddings=True)
    tensors = load_file(tuned / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    restore_checkpoint(base, tuned, tmp_path / "out")
    assert differences(load_folder(tmp_path / "out"), expected("llama", load_folder(base), load_folder(tuned))) == []


@pytest.mark.parametrize(
    ("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")]
)
def test_rows_are_cast_to_the_tuned_dtype(before: str, after: str, tmp_path: Path) -> None:
    tiny_model("gpt_neox", dtype=getattr(torch, before)).save_pretrained(tmp_path / "base")
    noised(tiny_model("gpt_neox", dtype=getattr(torch, after)), seed=1).save_pretrained(tmp_path / "tuned")
    restore_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    base, tuned = load_folder(tmp_path / "base"), load_folder(tmp_path / "tuned")
    assert {t.dtype for t in tuned.values()} == {getattr(torch, after)}
    found = load_folder(tmp_path / "out")
    assert differences(found, expected("gpt_neox", base, tuned)) == []
    if before == "float32":  # the twin: rounding through another dtype first is not the same
        assert differences(found, expected("gpt_neox", base, tuned, step0=torch.float16)) != []


def test_values_beyond_the_tuned_dtype_are_an_error(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", dtype=torch.float16)
    tensors = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 3] = 1e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QKGuardError, match=r"layers\.2.*k_proj.*float16"):
        restore_checkpoint(base, tuned, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"projections": ["q"]}, r"q_proj"),
        ({"projections": ["k"]}, r"k_proj"),
        ({"layers": [1, 3]}, r"layers\.[13]\..*[qk]_proj"),
        ({"include_norms": True}, r"[qk]_(proj|norm)"),
    ],
)
def test_selection(options: dict, pattern: str, tmp_path: Path) -> None:
    import re

    base, tuned = save_pair(tmp_path, "qwen3", shard="60KB")
    manifest = restore_checkpoint(base, tuned, tmp_path / "out", **options)
    old, raw, found = load_folder(base), load_folder(tuned), load_folder(tmp_path / "out")
    wanted = {name: old[name] if re.search(pattern, name) else raw[name] for name in raw}
    assert differences(found, wanted) == []
    assert {t["name"] for t in manifest["tensors"]} == {name for name in raw if re.search(pattern, name)}


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, tuned = save_pair(tmp_path, "qwen2", dtype=torch.bfloat16)
    torch.save(load_file(tuned / "model.safetensors"), tuned / "pytorch_model.bin")
    (tuned / "model.safetensors").rename(tmp_path / "kept.safetensors")
    with pytest.raises(QKGuardError, match=r"pickles.*save_pretrained"):
        restore_checkpoint(base, tuned, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tuned, dtype="auto").save_pretrained(tmp_path / "converted")  # as it says
    restore_checkpoint(base, tmp_path / "converted", tmp_path / "out")
    wanted = expected("qwen2", load_folder(base), load_file(tmp_path / "kept.safetensors"))
    assert differences(load_folder(tmp_path / "out"), wanted) == []


def test_a_text_model_tuned_from_a_multimodal_base(tmp_path: Path) -> None:
    """Names in the base's files are those that the tuned model's class loads from them."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = CONFIG_MAPPING["qwen3_5"](text_config=dict(CONFIGS["qwen3_5_text"]), vision_config=vision)
    noised(AutoModelForImageTextToText.from_config(config), 1).save_pretrained(tmp_path / "base")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    noised(text, 2).save_pretrained(tmp_path / "tuned")
    restore_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    base, tuned = load_folder(tmp_path / "base"), load_folder(tmp_path / "tuned")
    assert set(base) > set(tuned)
    assert differences(load_folder(tmp_path / "out"), expected("qwen3_5_text", base, tuned)) == []
