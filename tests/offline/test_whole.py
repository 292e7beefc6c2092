"""Checkpoints with a wrapper's names, or without some of their weights: never measured, never restored as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkguard.checkpoint.safetensors_io import read_header
from qkguard.errors import QKGuardError
from qkguard.offline.merge import merge_adapter
from qkguard.offline.models import LoadOptions, load_model
from qkguard.offline.restore import restore_checkpoint
from qkguard.offline.sweep import sweep
from qkguard.offline.verify import verify
from tests.support.lora import save_adapter
from tests.support.models import save_pair, tiny_model
from tests.support.oracle import differences, expected, load_folder

INDEX = "model.safetensors.index.json"
WRAPPED = {
    "_orig_mod.{}": "torch.compile(model)",
    "module.{}": "DDP",
    "module._orig_mod.{}": "both",
    "base_model.model.{}": "PEFT",
    "_forward_module.{}": "Lightning Fabric",
}


def rename(folder: Path, new_name) -> None:
    """Give every tensor of a folder another name, in its files and its index."""
    for file in folder.glob("*.safetensors"):
        save_file({new_name(n): t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {new_name(n): f for n, f in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))


def drop(folder: Path, part: str) -> None:
    file = folder / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if part not in n}
    assert len(kept) < len(load_file(file))
    save_file(kept, file, metadata={"format": "pt"})


def in_checkpointed_layers(name: str) -> str:
    """As activation checkpointing's wrapper leaves them."""
    parts = name.split(".")
    at = parts.index("layers") + 2 if "layers" in parts else 0
    return ".".join([*parts[:at], "_checkpoint_wrapped_module", *parts[at:]]) if at else name


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("wrapped", [*WRAPPED, "checkpointed"])
def test_a_wrappers_names_are_written_as_they_load(wrapped: str, shard: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, tuned = save_pair(tmp_path, "minimax", shard=shard)
    wanted = expected("minimax", load_folder(base), load_folder(tuned))
    rename(tuned, in_checkpointed_layers if wrapped == "checkpointed" else wrapped.format)
    _, info = AutoModelForCausalLM.from_pretrained(tuned, output_loading_info=True)
    assert info["missing_keys"], "the twin: the tuned folder itself does not load"

    out = tmp_path / "out"
    manifest = restore_checkpoint(base, tuned, out)
    assert differences(load_folder(out), wanted) == []
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert differences(load_folder(again), wanted) == []
    report = verify(out, full=True, load=True)
    assert report["raw"] == "unchanged" and report["loads"] == len(model.state_dict()) and not report["warnings"]
    if shard == "60KB" and wrapped != "checkpointed":
        assert {file["made"] for file in manifest["files"].values()} == {"patched", "renamed"}

    # the twins: a name, or a byte beside the restored rows, that is not the raw file's
    name = next(n for n in load_folder(out) if n.endswith("layers.0.input_layernorm.weight"))
    file = out / (
        json.loads((out / INDEX).read_text())["weight_map"][name] if shard == "60KB" else "model.safetensors"
    )
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"layers.0.input_layernorm", b"layers.0.input_layermorn", 1))
    with pytest.raises(QKGuardError, match="header"):
        verify(out, full=True)
    file.write_bytes(whole)
    at = read_header(file).tensors[name].start
    changed = bytearray(whole)
    changed[at] ^= 1
    file.write_bytes(changed)
    with pytest.raises(QKGuardError):
        verify(out, full=True)


def test_an_adapters_tensors_among_the_models_are_refused(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    tensors = {f"base_model.model.{n}": t for n, t in load_file(tuned / "model.safetensors").items()}
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.zeros(2, 64)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QKGuardError, match=r"1 tensors of a PEFT adapter.*lora_A.*merge_and_unload"):
        restore_checkpoint(base, tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    tensors = load_file(tuned / "model.safetensors")
    tensors["_orig_mod.model.norm.weight"] = torch.ones(64)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QKGuardError, match=r"model\.norm\.weight under 2 names.*_orig_mod"):
        restore_checkpoint(base, tuned, tmp_path / "out")


def test_a_tuned_folder_that_lacks_weights_is_not_restored(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", tie_word_embeddings=True)
    restore_checkpoint(base, tuned, tmp_path / "whole")  # a tied lm_head needs no tensor
    drop(tuned, "layers.2.mlp.up_proj")
    with pytest.raises(QKGuardError, match=r"no tensor for 1 of .*layers\.2\.mlp\.up_proj\.weight.*save_pretrained"):
        restore_checkpoint(base, tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_load_finds_what_would_stay_random(tmp_path: Path, run) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    out = tmp_path / "out"
    restore_checkpoint(base, tuned, out)
    code, text, _ = run("verify", out, "--load")
    assert code == 0 and "loads: each of the 39 parameters finds its tensor" in text
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    code, text, _ = run("verify", out)
    assert code == 0 and "loads" not in text
    code, _, err = run("verify", out, "--load")
    assert code == 2 and "no tensor for 9 of" in err and "model.layers.4." in err
    (out / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    code, _, err = run("verify", out, "--load")
    assert code == 2 and "another shape" in err and "[64, 96] for [64, 48]" in err
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "9 tensors find no parameter, first model.layers.3." in verify(out, load=True)["warnings"][0]


def test_models_with_missing_weights_are_not_measured(tmp_path: Path, run) -> None:
    base, tuned = save_pair(tmp_path, "llama", tie_word_embeddings=True, max_position_embeddings=1024)
    load_model(tuned, LoadOptions(device="cpu"))  # a tied lm_head is not missing
    drop(tuned, "layers.1.mlp.gate_proj")
    with pytest.raises(QKGuardError, match=r"1 weights are missing.*layers\.1\.mlp\.gate_proj\.weight"):
        load_model(tuned, LoadOptions(device="cpu"))
    with pytest.raises(QKGuardError, match=r"tuned has no tensor for 1 of .*gate_proj"):
        sweep(base, tuned, data="none", lengths=[256])
    with pytest.raises(QKGuardError, match=r"tuned has no tensor for 1 of .*gate_proj"):
        sweep(tuned, base, data="none", lengths=[256])


@pytest.mark.parametrize("wrapped", ["_orig_mod.{}", "module.{}", "base_model.model.{}"])
def test_a_wrappers_names_are_not_measured(wrapped: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    rename(tmp_path / "model", wrapped.format)
    with pytest.raises(QKGuardError, match=r"39 weights are missing.*fits none of them"):
        load_model(tmp_path / "model", LoadOptions(device="cpu"))


@pytest.mark.parametrize("case", ["plain", "untied"])
def test_a_base_with_a_wrappers_names_is_merged_as_it_loads(case: str, tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj", "v_proj"]}
    config |= {"modules_to_save": ["lm_head"]} if case == "untied" else {}
    tiny_model("llama", tie_word_embeddings=case == "untied").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter", **config)
    merge_adapter(tmp_path / "base", adapter, tmp_path / "wanted")
    rename(tmp_path / "base", "_orig_mod.{}".format)
    merge_adapter(tmp_path / "base", adapter, tmp_path / "out")
    assert differences(load_folder(tmp_path / "out"), load_folder(tmp_path / "wanted")) == []
    assert verify(tmp_path / "out", load=True)["loads"]


def test_adapters_with_missing_weights(tmp_path: Path) -> None:
    from qkguard.adapters.restored import write_restored_adapter
    from qkguard.layout import find_attention, select

    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)  # type: ignore[operator]
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    out = tmp_path / "out"
    write_restored_adapter(adapter, out, select(find_attention(base)))
    assert verify(out, load=True)["loads"] == 8
    load_model(out, LoadOptions(device="cpu"))
    load_model(adapter, LoadOptions(device="cpu"))
    file = adapter / "adapter_model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if "layers.2.self_attn.v_proj.lora_B" not in n}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(QKGuardError, match="weights of the adapter are missing"):
        load_model(adapter, LoadOptions(device="cpu"))
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 1}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(QKGuardError, match="expected the base model it was trained on"):
        verify(out, raw=False, load=True)


def test_a_model_too_short_for_every_default_length_is_refused_in_one_line(tmp_path: Path, run) -> None:
    from tests.support.probing import bpe_tokenizer

    base, tuned = save_pair(tmp_path, "llama", vocab_size=1024)
    for folder in (base, tuned):
        bpe_tokenizer().save_pretrained(folder)
    code, _, err = run("sweep", "--base", base, "--tuned", tuned, "--data", "none", "--device", "cpu")
    assert code == 2 and err.count("\n") == 1
    assert "512, 1024, 2048 do not fit the model's 128 positions" in err and "--lengths" in err
