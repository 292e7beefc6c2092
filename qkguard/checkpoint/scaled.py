"""Quantised tensors of a base checkpoint, dequantised block by block with the scales that are stored beside them.

A value is stored as a small number q (FP8, or INT8) and shares a scale s with its block: w = (q - z) * s, with a zero
point z in asymmetric formats alone. A tensor is never read without its scales; what is not known here is refused by
name. Formats: DeepSeek's and transformers' "fp8", compressed-tensors, FBGEMM and ModelOpt with unpacked weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from qkguard.arrays import along, bytes_of
from qkguard.checkpoint.safetensors_io import FLOATS, TensorEntry, opened, read_exactly
from qkguard.errors import QKGuardError
from qkguard.layout.spec import Block, ParamMap

FP8 = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
INTEGERS = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
METHODS = ("fp8", "compressed-tensors", "fbgemm_fp8", "modelopt")
"""`quant_method` of the formats whose scales multiply, and are stored as described above."""
UNPACKED = ("float-quantized", "int-quantized", "naive-quantized")
"""compressed-tensors' formats with one stored value per weight."""
SCALES = ("_scale_inv", "_scale")
"""What follows a tensor's name in that of its scales; both multiply, whatever DeepSeek's name says."""
DEFAULT_BLOCK = (128, 128)  # of "fp8" where the config says nothing, as in transformers' FineGrainedFP8Config
BAND = 1 << 21  # values dequantised at a time, so that memory stays at the rows asked for


class Tensors(Protocol):
    """What is needed here of a `weights.WeightFolder`."""

    @property
    def folder(self) -> Path: ...

    @property
    def where(self) -> Mapping[str, str]: ...

    def entry(self, name: str, /) -> TensorEntry: ...


@dataclass(frozen=True)
class ScaledTensor:
    """A quantised matrix and its scales: one for each block of `block` (rows, columns), the last ones cut short."""

    file: Path
    entry: TensorEntry
    block: tuple[int, int]
    scales: np.ndarray
    zero_points: np.ndarray | None

    def read(self, param: ParamMap) -> np.ndarray:
        """The selected rows (or columns) as a compact float32 array: each value times its scale, rounded once."""
        rows, columns = self.entry.shape
        out = np.empty(param.compact_shape, np.float32)
        ranges = param.ranges if param.dim == 0 else ((0, rows),)
        position, step = 0, max(1, BAND // columns)
        with opened(self.file) as fd:
            for start, stop in _bands(ranges, step):
                band = self._read_band(fd, start, stop)
                if param.dim == 1:
                    band = np.concatenate([along(band, 1, lo, hi) for lo, hi in param.ranges], 1)
                out[position : position + stop - start] = band
                position += stop - start
        return out

    def _read_band(self, fd: int, start: int, stop: int) -> np.ndarray:
        columns = self.entry.shape[1]
        stored = np.empty((stop - start, columns), np.uint8)
        read_exactly(fd, bytes_of(stored), self.entry.start + start * columns, self.entry.name)
        values = _values_of_bytes(self.entry.dtype)[stored]
        if self.zero_points is not None:
            values -= self._spread(self.zero_points, start, stop)
        values *= self._spread(self.scales, start, stop)
        return values

    def _spread(self, grid: np.ndarray, start: int, stop: int) -> np.ndarray:
        """What the grid has for every value of some rows."""
        of_rows = grid[np.arange(start, stop) // self.block[0]]
        return np.repeat(of_rows, self.block[1], 1)[:, : self.entry.shape[1]]


def _bands(ranges: Sequence[tuple[int, int]], step: int) -> Iterator[tuple[int, int]]:
    for lo, hi in ranges:
        for start in range(lo, hi, step):
            yield start, min(hi, start + step)


def _values_of_bytes(dtype: str) -> np.ndarray:
    """The value of every byte, in float32."""
    every = np.arange(256, dtype=np.uint8)
    return every.view(FP8.get(dtype, np.int8)).astype(np.float32)


def find_scaled(weights: Tensors, name: str) -> ScaledTensor | None:
    """A tensor with its scales; None where it is stored in a float dtype, without any.

    Raises:
        QKGuardError: it is quantised in a way that is not known here, or its scales are missing or do not fit.
    """
    entry: TensorEntry = weights.entry(name)
    scale = next((name + end for end in SCALES if name + end in weights.where), None)
    if entry.dtype in FLOATS and scale is None:
        return None
    config = quantisation(weights.folder)
    problem = _problem(entry, scale, config, weights.where)
    if problem is not None:
        raise refusal(weights.folder, f"{name} is stored as {entry.dtype} {problem}")
    assert scale is not None
    scales = _read_grid(weights, scale, config)
    zero = f"{name}_zero_point"
    points = _read_grid(weights, zero, config) if zero in weights.where else None
    block = _block(entry.shape, scales.shape, _block_sizes(config))
    if block is None or (points is not None and points.shape != scales.shape):
        raise refusal(
            weights.folder,
            f"{name} has shape {list(entry.shape)} and its scales {list(scales.shape)}, which fits no block size that "
            "the config names",
        )
    return ScaledTensor(weights.folder / weights.where[name], entry, block, scales, points)


def _problem(entry: TensorEntry, scale: str | None, config: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    """Why a quantised tensor cannot be read; None where it can."""
    method = config.get("quant_method")
    if scale is None:
        return "without scales beside it"
    if entry.dtype in FLOATS:
        return f"with scales beside it ({scale}), so it is not clear whether they are applied"
    if method not in METHODS:
        return f"with scales, but its config names {method or 'no quantisation'}"
    if method == "compressed-tensors" and _formats(config) - set(UNPACKED):
        return f"in the format {', '.join(sorted(_formats(config)))}"
    integers = entry.dtype == "I8" and method == "compressed-tensors"  # elsewhere I8 may hold two 4-bit numbers
    if entry.dtype not in FP8 and not integers:
        return "which is not one value per weight"
    if len(entry.shape) != 2:
        return f"with {len(entry.shape)} dimensions"
    if f"{entry.name}_g_idx" in names:
        return "with columns in another order (g_idx)"
    if any(config.get(key) for key in ("transform_config", "sparsity_config")):
        return "after a transform or a sparsification of its own"
    return None


def refusal(folder: Path, what: str) -> QKGuardError:
    """The error for a base that cannot be dequantised."""
    return QKGuardError(
        f"The base {folder} is quantised ({_describe(quantisation(folder))}): {what}. Expected plain floats, or FP8 "
        "or INT8 with their scales. Give the checkpoint that it was quantised from."
    )


def quantisation(folder: Path) -> dict[str, Any]:
    """The quantisation that a checkpoint's config names; empty where it names none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        nested = config.get("text_config") or {}
        found = [c.get(k) for c in (config, nested) for k in ("quantization_config", "compression_config")]
        return dict(next(filter(None, found), {}))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def describe_quantisation(folder: Path) -> str | None:
    """How a checkpoint is quantised, in a few words; None where it is not."""
    config = quantisation(folder)
    return _describe(config) if config else None


def _describe(config: Mapping[str, Any]) -> str:
    words = [str(config.get("quant_method") or "no quant_method in its config")]
    words += sorted(_formats(config))
    words += [f"{config['bits']} bits"] if "bits" in config else []
    words += [str(config["quant_algo"])] if config.get("quant_algo") else []
    return ", ".join(words)


def _formats(config: Mapping[str, Any]) -> set[str]:
    """compressed-tensors' formats, of the whole and of its groups."""
    own = [group.get("format") for group in _groups(config)]
    named = [found for found in own if found] or [config.get("format")]
    return {str(found) for found in named if found}


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = config.get("config_groups") or {}
    return [group for group in groups.values() if isinstance(group, Mapping)]


def _block_sizes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Every block size that the config names."""
    if config.get("quant_method") == "fp8":
        named = config.get("weight_block_size", DEFAULT_BLOCK)
        return [] if named is None else [(int(named[0]), int(named[1]))]
    found = []
    for group in _groups(config):
        weights = group.get("weights") or {}
        if weights.get("block_structure"):
            rows, columns = weights["block_structure"]
            found.append((int(rows), int(columns)))
        if weights.get("group_size"):
            found.append((1, int(weights["group_size"])))
    return list(dict.fromkeys(found))


def _block(shape: tuple[int, ...], grid: tuple[int, ...], sizes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The block of one scale: a size that the config names, else a row or the whole tensor; None if none fits."""
    rows, columns = shape
    fits = [size for size in sizes if (-(-rows // size[0]), -(-columns // size[1])) == grid]
    if len(fits) == 1:
        return fits[0]
    return {(1, 1): (rows, columns), (rows, 1): (1, columns)}.get((grid[0], grid[1])) if not fits else None


def _read_grid(weights: Tensors, name: str, config: Mapping[str, Any]) -> np.ndarray:
    """Scales (or zero points) as a float32 matrix: one for a tensor or a row is a column of them."""
    entry: TensorEntry = weights.entry(name)
    exponents = entry.dtype == "F8_E8M0" or (entry.dtype == "U8" and config.get("scale_fmt") == "ue8m0")
    integers = entry.dtype in INTEGERS and name.endswith("_zero_point")
    if not (exponents or integers or entry.dtype in FLOATS) or len(entry.shape) > 2:
        raise refusal(weights.folder, f"{name} is stored as {entry.dtype} {list(entry.shape)}")
    dtype: Any = FLOATS.get(entry.dtype) or INTEGERS.get(entry.dtype, np.uint8)
    if exponents:
        dtype = ml_dtypes.float8_e8m0fnu
    stored = _read_as(weights, name, dtype)
    return stored.astype(np.float32).reshape((-1, 1) if len(entry.shape) < 2 else entry.shape)


def scale_names(weights: Tensors) -> set[str]:
    """The tensors of a folder that hold nothing but the scales and zero points of others."""
    ends = (*SCALES, "_zero_point", "_g_idx")
    return {name + end for name in weights.where for end in ends if name + end in weights.where}


def read_whole(weights: Tensors, name: str) -> np.ndarray:
    """One whole tensor: dequantised to float32 where it has scales, else as it is stored.

    Raises:
        QKGuardError: as `find_scaled`, or a dtype that is not known.
    """
    entry: TensorEntry = weights.entry(name)
    if entry.dtype in INTEGERS and not any(name + end in weights.where for end in SCALES):
        return _read_as(weights, name, INTEGERS[entry.dtype])
    scaled = find_scaled(weights, name)
    if scaled is None:
        return _read_as(weights, name, entry.float_dtype)
    return scaled.read(ParamMap(name, entry.shape, 0, "weight", (Block(0, entry.shape[0], "v"),)))


def _read_as(weights: Tensors, name: str, dtype: Any) -> np.ndarray:
    entry = weights.entry(name)
    stored: np.ndarray = np.empty(entry.shape, dtype)
    with opened(weights.folder / weights.where[name]) as fd:
        read_exactly(fd, bytes_of(stored), entry.start, name)
    return stored
