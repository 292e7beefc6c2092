"""Quantised bases: queries and keys are dequantised block by block with their scales, or refused by name."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qkguard.checkpoint import scaled
from qkguard.checkpoint.scaled import find_scaled, read_whole, scale_names
from qkguard.checkpoint.weights import open_weights
from qkguard.errors import QKGuardError
from qkguard.layout.spec import Block, ParamMap
from qkguard.offline.drift_report import drift_report
from qkguard.offline.models import LoadOptions, load_model
from qkguard.offline.restore import restore_checkpoint
from qkguard.offline.verify import verify
from tests.support.models import save_pair
from tests.support.oracle import differences, expected, load_folder
from tests.support.quantised import FORMATS, FP8_BLOCKS, compressed, quantise, set_config

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("name", FORMATS)
def test_restored_with_the_scales_of_every_format(name: str, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", dtype=torch.bfloat16)
    meant = quantise(base, name)
    manifest = restore_checkpoint(base, tuned, tmp_path / "out")
    # One float32 product of two exact numbers, then the tuned dtype
    before = load_folder(base) | {key: value.float() for key, value in meant.items()}
    found = load_folder(tmp_path / "out")
    assert differences(found, expected("llama", before, load_folder(tuned))) == []
    assert manifest["base"]["quantised"].startswith(FORMATS[name][0]["quant_method"])
    verify(tmp_path / "out", full=True)

    # the twins: the stored numbers without scales, and the scales of another block
    cast = {key: load_file(base / "model.safetensors")[key].float() for key in meant}
    assert differences(found, expected("llama", before | cast, load_folder(tuned)))
    if meant[QUERY].shape[0] > 16:
        rolled = before | {QUERY: before[QUERY] * 1.0}
        rolled[QUERY][:16] *= 1.5
        assert differences(found, expected("llama", rolled, load_folder(tuned))) == [QUERY]


def test_as_transformers_dequantises(tmp_path: Path) -> None:
    """Which it does on a CPU, where FP8 does not run, for this format."""
    from transformers import AutoModelForCausalLM

    base, tuned = save_pair(tmp_path, "llama", dtype=torch.bfloat16)
    quantise(base, "fp8 blocks")
    loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    theirs = {key: value for key, value in loaded.state_dict().items() if "_proj" in key}
    assert {value.dtype for value in theirs.values()} == {torch.bfloat16}
    weights = open_weights(base)
    for key, value in theirs.items():
        assert torch.equal(torch.from_numpy(read_whole(weights, key)).bfloat16(), value), key
    restore_checkpoint(base, tuned, tmp_path / "out")
    assert differences(load_folder(tmp_path / "out"), expected("llama", theirs, load_folder(tuned))) == []
    theirs[QUERY] = theirs[QUERY].roll(1, 0)
    assert differences(load_folder(tmp_path / "out"), expected("llama", theirs, load_folder(tuned))) == [QUERY]


def test_measured_in_one_dtype(tmp_path: Path) -> None:
    """transformers dequantises into the dtype asked for, and leaves plain tensors in theirs."""
    base, _ = save_pair(tmp_path, "llama", dtype=torch.float16)
    quantise(base, "fp8 blocks")
    model: Any = load_model(base, LoadOptions("float32", "cpu"))
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("dim", [0, 1])
def test_some_rows_or_columns_in_little_memory(dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = 4000, 1000
    whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    scales = torch.rand(32, 8, generator=torch.Generator().manual_seed(1)) + 0.5
    tensors = {"w": whole.to(torch.float8_e4m3fn), "w_scale_inv": scales}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    param = ParamMap("w", (rows, columns), dim, "weight", (Block(3, 90, "q"), Block(200, 290, "k")))
    monkeypatch.setattr(scaled, "BAND", 1 << 13)
    found = find_scaled(open_weights(tmp_path), "w")
    assert found is not None
    tracemalloc.start()
    values = found.read(param)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    meant = (
        tensors["w"].double() * scales.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :1000]
    )
    assert np.array_equal(values, param.take(meant).float().numpy())
    assert not np.array_equal(values, param.take(tensors["w"].float()).numpy())
    assert peak < values.nbytes + (1 << 18), "a band at a time beside the rows asked for"


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_scales(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.endswith("_scale_inv")]:
        del tensors[key]


def floats_beside_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors[QUERY] = tensors[QUERY].bfloat16()


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[QUERY] = tensors[QUERY].view(torch.int8)


def packed(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        tensors[key.removesuffix("weight") + "qweight"] = tensors.pop(key).view(torch.int32)


def fewer_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{QUERY}_scale_inv"] = tensors[f"{QUERY}_scale_inv"][:3].contiguous()


def kept(tensors: dict[str, torch.Tensor]) -> None:
    pass


REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], dict[str, Any], str]] = {
    "no scales": (without_scales, FP8_BLOCKS, r"is quantised \(fp8\): .*F8_E4M3 without scales"),
    "scales beside floats": (floats_beside_scales, FP8_BLOCKS, "BF16 with scales beside it"),
    "two values in a byte": (integers, FP8_BLOCKS, "I8 which is not one value per weight"),
    "a grid of another size": (fewer_scales, FP8_BLOCKS, r"its scales \[3, 2\], which fits no block size"),
    "an unknown method": (kept, {"quant_method": "quark"}, r"\(quark\): .*its config names quark"),
    "no method": (kept, {}, "names no quantisation"),
    "packed": (
        packed,
        {"quant_method": "gptq", "bits": 4},
        r"\(gptq, 4 bits\): .*do not hold .*self_attn.k_proj.weight in its own shape",
    ),
    "a packed format": (kept, compressed("group") | {"format": "pack-quantized"}, "in the format pack-quantized"),
    "a transform": (kept, compressed("block") | {"transform_config": {"a": {}}}, "after a transform"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_by_name(case: str, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", dtype=torch.bfloat16)
    quantise(base, "fp8 blocks")
    damage, config, message = REFUSED[case]
    change(base, damage)
    set_config(base, quantization_config=config)
    with pytest.raises(QKGuardError, match=rf"The base .*{message}.*Give the checkpoint that it was quantised from"):
        restore_checkpoint(base, tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_drift_and_names(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", dtype=torch.bfloat16)
    plain = drift_report(base, tuned, routing=False)["mean"]["q_rel"]
    quantise(base, "fp8 blocks")
    rough = drift_report(base, tuned, routing=False)["mean"]["q_rel"]
    assert plain < rough < plain + 0.05, "E4M3 keeps a value to a sixteenth at worst"
    weights = open_weights(base)
    assert scale_names(weights) == {name for name in weights.where if name.endswith("_scale_inv")} != set()


def test_a_quantised_tuned_checkpoint_is_refused(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", dtype=torch.bfloat16)
    quantise(tuned, "fp8 blocks")
    with pytest.raises(QKGuardError, match="stored as F8_E4M3, which is a quantised format"):
        restore_checkpoint(base, tuned, tmp_path / "out")
