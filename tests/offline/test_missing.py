"""Tensors that the base has and the tuned folder lost: named in one line, or carried along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qkguard.checkpoint import carried
from qkguard.errors import QKGuardError
from qkguard.offline.missing import lost_tensors
from qkguard.offline.pair import open_folders
from qkguard.offline.restore import restore_checkpoint
from qkguard.offline.verify import verify
from tests.conftest import Run
from tests.support.models import CONFIGS, noised, save_pair
from tests.support.oracle import differences, expected, load_folder
from tests.support.quantised import FP8_BLOCKS, quantise, set_config

INDEX = "model.safetensors.index.json"


def predictor(seed: int = 0) -> dict[str, Tensor]:
    """A multi-token-prediction layer, in several dtypes."""
    random = torch.Generator().manual_seed(seed)
    return {
        "mtp.fc.weight": torch.randn(64, 128, generator=random).bfloat16(),
        "mtp.layers.0.self_attn.q_proj.weight": torch.randn(64, 64, generator=random).bfloat16(),
        "mtp.norm.weight": torch.randn(64, generator=random),
        "mtp.layers.0.table": torch.arange(7),
        "mtp.scale": torch.tensor(0.5),
    }


def add(folder: Path, tensors: dict[str, Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def pair_that_lost(folder: Path, shard: str = "5GB") -> tuple[Path, Path]:
    base, _ = save_pair(folder, "llama", dtype=torch.bfloat16)
    _, tuned = save_pair(folder / "again", "llama", dtype=torch.bfloat16, shard=shard)
    add(base, predictor())
    set_config(base, num_nextn_predict_layers=1)
    return base, tuned


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_named_and_carried(shard: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, tuned = pair_that_lost(tmp_path, shard)
    without = restore_checkpoint(base, tuned, tmp_path / "without")
    line, config = without["warnings"]
    assert (
        line.startswith("the tuned checkpoint lacks 5 tensors that the base has (mtp: 5)")
        and "--carry-missing" in line
    )
    assert config.startswith("num_nextn_predict_layers is 1 in the base's config, and the tuned one dropped it")
    wanted = expected("llama", load_folder(base), load_folder(tuned))
    assert differences(load_folder(tmp_path / "without"), wanted) == [] and "carried" not in without

    out = tmp_path / "out"
    manifest = restore_checkpoint(base, tuned, out, carry_missing=True)
    assert differences(load_folder(out), wanted | predictor()) == []
    assert differences(load_folder(out), wanted | predictor(1)) == sorted(k for k in predictor() if k[-5:] == "eight")
    assert manifest["warnings"] == [config] and {entry["name"] for entry in manifest["carried"]} == set(predictor())
    made = [file["made"] for file in manifest["files"].values()]
    assert made.count("added") == 1 and made.count("linked") == [f["made"] for f in without["files"].values()].count(
        "linked"
    )
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load_folder(out).values())
    assert (
        set(index["weight_map"].values())
        == {file.name for file in out.glob("*.safetensors")}
        == set(manifest["files"])
    )
    assert "5 tensors that the fine-tuned checkpoint lacks were carried over" in (out / "README.md").read_text()
    report = verify(out, full=True, load=True)
    assert report["carried"] == 5 and report["warnings"] == [
        config,
        "5 tensors find no parameter, first mtp.fc.weight",
    ]
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == set(predictor())
    assert differences({k: v for k, v in model.state_dict().items() if k in wanted}, wanted) == []

    again = restore_checkpoint(base, out, tmp_path / "again2", carry_missing=True)
    assert "carried" not in again and not any("lacks" in text for text in again["warnings"]), "nothing is lost now"


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    base, tuned = pair_that_lost(tmp_path)
    out = tmp_path / "out"
    manifest = restore_checkpoint(base, tuned, out, carry_missing=True)
    (file,) = {entry["file"] for entry in manifest["carried"]}
    whole = (out / file).read_bytes()
    (out / file).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(QKGuardError, match="content"):
        verify(out)
    (out / file).write_bytes(whole)
    manifest["carried"][0]["sha256"] = "0" * 64
    (out / "qkguard.json").write_text(json.dumps(manifest))
    verify(out)
    with pytest.raises(QKGuardError, match="differs from what was carried over from the base"):
        verify(out, full=True)


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair_that_lost(tmp_path)
    monkeypatch.setattr(carried, "SHARD_BYTES", 10_000)
    monkeypatch.setattr(carried, "SCAN_BYTES", 1000)
    manifest = restore_checkpoint(base, tuned, tmp_path / "out", carry_missing=True)
    assert sorted(manifest["files"]) == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    wanted = expected("llama", load_folder(base), load_folder(tuned)) | predictor()
    assert differences(load_folder(tmp_path / "out"), wanted) == []
    verify(tmp_path / "out", full=True)


@pytest.mark.parametrize("form", ["fp8 blocks", "compressed int8 with zero points"])
def test_quantised_ones_are_dequantised(form: str, tmp_path: Path) -> None:
    """The raw folder's config says nothing of scales, so nobody would apply them."""
    base, tuned = pair_that_lost(tmp_path)
    meant = quantise(base, form)
    name = "mtp.layers.0.self_attn.q_proj.weight"
    manifest = restore_checkpoint(base, tuned, tmp_path / "out", carry_missing=True)
    found = load_folder(tmp_path / "out")
    assert torch.equal(found[name], meant[name].float().bfloat16()) and not torch.equal(found[name], predictor()[name])
    assert {entry["name"]: entry["dequantised"] for entry in manifest["carried"]} == {
        k: k == name for k in predictor()
    }
    verify(tmp_path / "out", full=True)


def test_ones_without_scales_are_refused(tmp_path: Path) -> None:
    base, tuned = pair_that_lost(tmp_path)
    add(base, {"mtp.fc.weight": predictor()["mtp.fc.weight"].to(torch.float8_e4m3fn)})
    set_config(base, quantization_config=FP8_BLOCKS)
    restore_checkpoint(base, tuned, tmp_path / "without")
    with pytest.raises(QKGuardError, match=r"quantised \(fp8\): mtp.fc.weight is stored as F8_E4M3 without scales"):
        restore_checkpoint(base, tuned, tmp_path / "out", carry_missing=True)
    assert not (tmp_path / "out").exists()


def test_a_file_that_the_config_names_stands_alone(tmp_path: Path) -> None:
    base, tuned = pair_that_lost(tmp_path)
    (tuned / "model.safetensors").rename(tuned / "weights.safetensors")
    set_config(tuned, transformers_weights="weights.safetensors")
    with pytest.raises(QKGuardError, match=r"names its one weight file weights\.safetensors in its config"):
        restore_checkpoint(base, tuned, tmp_path / "out", carry_missing=True)


# -- what is lost, and what only has another name -----------------------------------------------------------------


def lost(base: Path, tuned: Path) -> list[str]:
    return lost_tensors(open_folders(base, tuned))


def test_only_what_has_no_counterpart_is_lost(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", tie_word_embeddings=True)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"].clone()
    add(base, {"lm_head.weight": embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert lost(base, tuned) == [], "the output embedding is tied to one that is there, frequencies are made anew"
    extra = {"model.layers.4.eh_proj.weight": torch.ones(2), "model.layers.4.enorm.weight": torch.ones(2)}
    add(base, {f"_orig_mod.{name}": tensor for name, tensor in extra.items()})
    assert lost(base, tuned) == [f"_orig_mod.{name}" for name in extra]
    manifest = restore_checkpoint(base, tuned, tmp_path / "named")
    assert "(_orig_mod.model.layers.4: 2)" in manifest["warnings"][0]
    restore_checkpoint(base, tuned, tmp_path / "out", carry_missing=True)
    assert extra.keys() <= load_folder(tmp_path / "out").keys(), "under the name that it is loaded by"


def test_experts_that_are_stored_joined(tmp_path: Path) -> None:
    """One file of each expert, or one of all: both are loaded into the same parameter."""
    from transformers import AutoModelForCausalLM

    base, tuned = save_pair(tmp_path, "minimax")
    model: Any = AutoModelForCausalLM.from_pretrained(tuned)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(state) != set(load_file(base / "model.safetensors"))
    save_file(state, tuned / "model.safetensors", metadata={"format": "pt"})
    assert lost(base, tuned) == []
    add(base, {"mtp.fc.weight": torch.ones(2)})
    assert lost(base, tuned) == ["mtp.fc.weight"]


def test_the_towers_of_a_multimodal_base_are_not_lost_by_its_language_model(tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = CONFIG_MAPPING["qwen3_5"](text_config=dict(CONFIGS["qwen3_5_text"]), vision_config=vision)
    noised(AutoModelForImageTextToText.from_config(config), 1).save_pretrained(tmp_path / "base")
    noised(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), 2).save_pretrained(tmp_path / "tuned")
    assert lost(tmp_path / "base", tmp_path / "tuned") == []
    add(tmp_path / "base", {"mtp.fc.weight": torch.ones(2)})
    assert lost(tmp_path / "base", tmp_path / "tuned") == ["mtp.fc.weight"]


DROPPED: list[tuple[Callable[[Path], None], int]] = [
    (lambda folder: set_config(folder, num_nextn_predict_layers=1), 0),
    (lambda folder: set_config(folder, num_nextn_predict_layers=0), 1),
    (lambda folder: set_config(folder, mtp_num_hidden_layers=1), 1),
]


@pytest.mark.parametrize("number", range(3))
def test_config_fields_that_went_with_them(number: int, tmp_path: Path) -> None:
    base, tuned = pair_that_lost(tmp_path)
    change, count = DROPPED[number]
    change(tuned)
    warnings = restore_checkpoint(base, tuned, tmp_path / "out", carry_missing=True)["warnings"]
    assert len([text for text in warnings if text.startswith("num_nextn_predict_layers is 1")]) == count


def test_as_typed(tmp_path: Path, run: Run) -> None:
    base, tuned = pair_that_lost(tmp_path)
    pair = ("restore", "--base", base, "--tuned", tuned)
    code, text, err = run(*pair, "--out", tmp_path / "a")
    assert code == 0 and err.count("\n") == 2 and "lacks 5 tensors" in err and "carried" not in text
    code, text, err = run(*pair, "--out", tmp_path / "b", "--carry-missing")
    assert code == 0 and err.count("\n") == 1 and "num_nextn_predict_layers" in err
    assert (
        "5 tensors of the base carried over that the tuned checkpoint lacks, first mtp." in text
        and "drift taken" in text
    )
    assert run("verify", tmp_path / "b", "--full")[0] == 0
