"""Write a safetensors file one tensor at a time, so that memory stays at the largest tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from qkguard.safetensors_io import bytes_of, write_header

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class SafetensorsWriter:
    """Context manager: the header of name -> (dtype, shape) is written first, the tensors then in that order.

    A file left before every tensor was written is removed, so that nothing half-written looks whole.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.path, self._pending = path, list(tensors.items())
        self._file = open(path, "wb")  # noqa: SIM115 - closed in __exit__
        write_header(self._file, {name: (DTYPE_NAMES[dtype], shape) for name, (dtype, shape) in tensors.items()})

    def write(self, tensor: Tensor) -> None:
        """The next tensor, on any device."""
        name, expected = self._pending.pop(0)
        assert (tensor.dtype, tuple(tensor.shape)) == expected, (name, expected, tensor.dtype, tensor.shape)
        self._file.write(bytes_of(tensor.detach().cpu().contiguous()))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        whole = kind is None and not self._pending
        if whole:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if not whole:
            self.path.unlink(missing_ok=True)
            assert kind is not None, f"{self.path}: {self._pending[0][0]} was never written"
