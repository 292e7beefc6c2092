"""Write a safetensors file one tensor at a time, so that memory stays at the largest tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qkguard.checkpoint.safetensors_io import NAMES, bytes_of, write_header
from qkguard.errors import QKGuardError


class SafetensorsWriter:
    """The header of name -> (dtype, shape) is written first, the tensors then in that order, `close` makes it durable.

    A write that fails (no space) is remembered and raised by `close`, which then removes the file: in between the
    caller's ranks may be gathering the next tensors together and must not be left by one of them.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.path, self._pending = path, list(tensors.items())
        self._failure: OSError | None = None
        self._file = open(path, "wb")  # noqa: SIM115 - closed in `close`
        write_header(self._file, {name: (NAMES[dtype], shape) for name, (dtype, shape) in tensors.items()})

    def write(self, tensor: Tensor) -> None:
        """The next tensor, on any device."""
        name, expected = self._pending.pop(0)
        assert (tensor.dtype, tuple(tensor.shape)) == expected, (name, expected, tensor.dtype, tensor.shape)
        if self._failure is None:
            try:
                self._file.write(bytes_of(tensor.detach().cpu().contiguous()))
            except OSError as error:
                self._failure = error

    def close(self) -> None:
        """Finish the file; QKGuardError, and no file, where a write failed."""
        assert not self._pending, f"{self.path}: {self._pending[0][0]} was never written"
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            self._failure = self._failure or error
        if self._failure is not None:
            self.path.unlink(missing_ok=True)
            raise QKGuardError(f"cannot write {self.path}: {self._failure.strerror}; free some space and try again")
