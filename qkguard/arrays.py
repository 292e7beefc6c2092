"""Rows as numpy arrays or torch tensors: what the two spell differently, in one place.

Files are read and written as numpy arrays (bfloat16 through ml_dtypes), so that what only moves bytes never imports
torch; what lives in a model is a torch tensor. Formulas (`drift`, `layout.heads`) are written once, for either.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = Any
"""A numpy array or a torch tensor; a function hands back the kind that it was given."""

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

PIECE = 1 << 18  # bytes that are compared at a time: they and the answers stay in the cache

_LARGEST = {  # bit patterns of infinity, above which lie the NaNs
    np.dtype(np.float64): 0x7FF0 << 48,
    np.dtype(np.float32): 0x7F80 << 16,
    np.dtype(np.float16): 0x7C00,
    BFLOAT16: 0x7F80,
}


def library(array: Array) -> Any:
    """numpy or torch, whichever an array is of; both have `sqrt`, `zeros`, `concat`, `linalg` and much else alike."""
    if isinstance(array, np.ndarray):
        return np
    import torch

    return torch


def dtype_name(dtype: Any) -> str:
    """The name that numpy and torch share: "float32", "bfloat16", "float8_e4m3fn"."""
    return str(dtype).removeprefix("torch.")


def single(array: Array) -> Array:
    """In float32."""
    return array.astype(np.float32, copy=False) if isinstance(array, np.ndarray) else array.float()


def double(array: Array, *, copy: bool = False) -> Array:
    """In float64; with `copy` never the array itself."""
    if isinstance(array, np.ndarray):
        return array.astype(np.float64, copy=copy)
    return array.to(library(array).float64, copy=copy)


def cast(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rows in another float dtype, rounded to nearest even as torch does it; the same array where it has it already.

    What does not fit becomes infinite. From float64 to a half precision torch rounds twice, by way of float32.
    """
    if rows.dtype == dtype:
        return rows
    with np.errstate(over="ignore"):  # the caller looks for Inf
        if rows.dtype == np.float64 and dtype.itemsize == 2:
            rows = rows.astype(np.float32)
        return rows.astype(dtype)


def like(values: np.ndarray, array: Array) -> Array:
    """Values as an array of the same kind, and on the same device, as another; their dtype stays."""
    if isinstance(array, np.ndarray):
        return values
    import torch

    return torch.from_numpy(values).to(array.device)


def zeros(shape: int | tuple[int, ...], array: Array) -> Array:
    """float64 zeros of the same kind, and on the same device, as another array."""
    if isinstance(array, np.ndarray):
        return np.zeros(shape)
    import torch

    return torch.zeros(shape, dtype=torch.float64, device=array.device)  # made there: a copy would wait for it


def along(array: Array, dim: int, start: int, stop: int) -> Array:
    """A view of the elements `start:stop` along one dimension."""
    return array[(slice(None),) * dim + (slice(start, stop),)]


def as_tensor(array: Array) -> Tensor:
    """A torch tensor that shares a numpy array's memory; a tensor as it is."""
    import torch

    if not isinstance(array, np.ndarray):
        return array
    if array.dtype == BFLOAT16:  # which torch does not know in numpy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: Tensor) -> np.ndarray:
    """A numpy array that shares a CPU tensor's memory."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def flat_bytes(array: Array) -> Array:
    """All bytes in order, 1-D uint8; without a copy where the array is contiguous."""
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    import torch

    return array.contiguous().view(-1).view(torch.uint8)


def bytes_of(array: Array) -> memoryview:
    """The bytes of a contiguous array or CPU tensor, without a copy."""
    flat = flat_bytes(array)
    whole: np.ndarray = flat if isinstance(flat, np.ndarray) else flat.numpy()
    return whole.data


def sha256_of(array: Array) -> str:
    """The hash of an array's or CPU tensor's bytes."""
    return hashlib.sha256(bytes_of(array)).hexdigest()


def same_bits(a: Array, b: Array) -> bool:
    """Equal shape, dtype and bit patterns (NaNs are equal to themselves, 0.0 and -0.0 differ).

    On the CPU piece by piece, so that the first difference ends it.
    """
    if tuple(a.shape) != tuple(b.shape) or dtype_name(a.dtype) != dtype_name(b.dtype):
        return False
    if not isinstance(a, np.ndarray) and a.device.type != "cpu":
        return bool((flat_bytes(a) == flat_bytes(b)).all())
    one, other = (np.frombuffer(bytes_of(array), np.uint8) for array in (a, b))
    pieces = (slice(start, start + PIECE) for start in range(0, len(one), PIECE))
    return all(np.array_equal(one[piece], other[piece]) for piece in pieces)


def has_nonfinite(rows: np.ndarray) -> bool:
    """Whether a contiguous floating-point array holds NaN or Inf.

    Of either sign these are the largest bit patterns, so two maxima of integers tell, at the speed of memory.
    """
    if not rows.size:
        return False
    infinity, bits = _LARGEST[rows.dtype], 8 * rows.dtype.itemsize
    positive = int(rows.view(f"i{bits // 8}").max()) >= infinity
    return positive or int(rows.view(f"u{bits // 8}").max()) >= infinity | 1 << (bits - 1)
