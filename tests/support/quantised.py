"""Checkpoints quantised by hand, in the formats that bases are published in, and what they hold in plain float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8_BLOCKS: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}


def compressed(strategy: str, kind: str = "float", **more: Any) -> dict[str, Any]:
    """compressed-tensors' config of one group."""
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True} | more
    form = "float-quantized" if kind == "float" else "int-quantized"
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


FORMATS: dict[str, tuple[dict[str, Any], str, tuple[int, int], str]] = {
    # config, name of the scales, (rows, columns) of a block with 0 for all, how scales are stored
    "fp8 blocks": (FP8_BLOCKS, "weight_scale_inv", (16, 32), "matrix"),
    "fp8 blocks that do not divide": (
        FP8_BLOCKS | {"weight_block_size": [24, 40]},
        "weight_scale_inv",
        (24, 40),
        "matrix",
    ),
    "fp8 without a block size": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        "weight_scale_inv",
        (128, 128),
        "matrix",
    ),
    "fp8 of one scale": (FP8_BLOCKS | {"weight_block_size": None}, "weight_scale_inv", (0, 0), "number"),
    "fp8 with exponents": (FP8_BLOCKS | {"scale_fmt": "ue8m0"}, "weight_scale_inv", (16, 32), "exponents"),
    "fp8 with exponents in bytes": (FP8_BLOCKS | {"scale_fmt": "ue8m0"}, "weight_scale_inv", (16, 32), "bytes"),
    "compressed tensor": (compressed("tensor"), "weight_scale", (0, 0), "vector"),
    "compressed channel": (compressed("channel"), "weight_scale", (1, 0), "matrix"),
    "compressed block": (compressed("block", block_structure=[16, 32]), "weight_scale", (16, 32), "matrix"),
    "compressed group": (compressed("group", group_size=16), "weight_scale", (1, 16), "half matrix"),
    "compressed int8": (compressed("channel", "int"), "weight_scale", (1, 0), "matrix"),
    "compressed int8 with zero points": (
        compressed("channel", "int", symmetric=False),
        "weight_scale",
        (1, 0),
        "zeros",
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "weight_scale", (1, 0), "matrix"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "weight_scale", (0, 0), "number"),
}


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def blown_up(grid: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """A grid's number for every element, by plain loops over the blocks, in float64."""
    out = torch.empty(shape, dtype=torch.float64)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            out[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] = grid[i, j].double()
    return out


def quantise(folder: Path, name: str, part: str = "_proj.weight") -> dict[str, Tensor]:
    """Quantise the matrices of a one-file checkpoint whose names end so; what each then stands for, in float64."""
    config, scale_name, sizes, how = FORMATS[name]
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for key in [key for key in tensors if key.endswith(part)]:
        whole = tensors[key].double()
        rows, columns = whole.shape
        block = (sizes[0] or rows, sizes[1] or columns)
        grid = torch.zeros(math.ceil(rows / block[0]), math.ceil(columns / block[1]), dtype=torch.float64)
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                piece = whole[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
                grid[i, j] = piece.abs().max() / (127 if "int8" in name else 448)
        scales = grid.float()
        if how in ("exponents", "bytes"):
            scales = torch.exp2(scales.log2().ceil())
        if how == "half matrix":
            scales = scales.bfloat16()
        wide = blown_up(scales, block, whole.shape)
        zeros = torch.zeros_like(wide)
        if "int8" in name:
            if how == "zeros":
                tensors[f"{key}_zero_point"] = torch.arange(rows)[:, None].remainder(7).to(torch.int8) - 3
                zeros = tensors[f"{key}_zero_point"].double().expand_as(wide)
            tensors[key] = (whole / wide + zeros).round().clamp(-128, 127).to(torch.int8)
        else:
            tensors[key] = (whole / wide).float().to(torch.float8_e4m3fn)
        meant[key] = (tensors[key].double() - zeros) * wide
        if how in ("number", "vector"):
            scales = scales.reshape(() if how == "number" else (-1,))
        elif how == "exponents":
            scales = scales.to(torch.float8_e8m0fnu)
        elif how == "bytes":
            scales = (scales.log2() + 127).to(torch.uint8)
        tensors[key.removesuffix("weight") + scale_name] = scales.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, quantization_config=config)
    return meant
