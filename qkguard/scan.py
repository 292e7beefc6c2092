"""NaN and Inf in tensors and in whole files, at the speed of memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qkguard.safetensors_io import FLOATS, TensorEntry, bytes_of, read_exactly

CHUNK = 4 << 20  # bytes: stays in the cache between the read and the sum


def has_nonfinite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds NaN or Inf. They survive a sum, so only odd sums are looked into."""
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return not bool(torch.isfinite(total)) and not bool(torch.isfinite(tensor).all())


def nonfinite_tensors(fd: int, entries: Iterable[TensorEntry]) -> list[str]:
    """Names of the tensors of a safetensors file that hold NaN or Inf; quantised and integer ones are skipped."""
    buffer = torch.empty(CHUNK, dtype=torch.uint8)
    found = []
    for entry in entries:
        if entry.dtype in FLOATS and entry.stop > entry.start:
            for start in range(entry.start, entry.stop, CHUNK):
                piece = buffer[: min(CHUNK, entry.stop - start)]
                read_exactly(fd, bytes_of(piece), start, entry.name)
                if has_nonfinite(piece.view(FLOATS[entry.dtype])):
                    found.append(entry.name)
                    break
    return found
