"""PyTorch pickles, only when asked for: unpickled weights-only, memory-mapped, and rewritten as safetensors."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from qkguard.checkpoint.safetensors_io import PLAIN, TensorEntry, bytes_of, write_header
from qkguard.checkpoint.weights import PICKLE_INDEX, PICKLE_SINGLE, read_index
from qkguard.errors import QKGuardError
from qkguard.layout.spec import ParamMap


@dataclass(frozen=True)
class PickleFolder:
    """A checkpoint in `pytorch_model*.bin` files, whose tensors stay on disk until they are read."""

    folder: Path
    files: Mapping[str, Mapping[str, Tensor]]
    where: Mapping[str, str]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self.files[file][name].shape) for name, file in self.where.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.files[self.where[name]][name].dtype

    def read(self, name: str, param: ParamMap) -> Tensor:
        return param.take(self.files[self.where[name]][name]).clone(memory_format=torch.contiguous_format)

    def convert(self, file: str, target: BinaryIO) -> dict[str, TensorEntry]:
        """Write one file's tensors as safetensors, one tensor in memory at a time; tied ones once under each name."""
        tensors = self.files[file]
        entries = write_header(target, {n: (PLAIN[t.dtype], tuple(t.shape)) for n, t in tensors.items()})
        for tensor in tensors.values():
            target.write(bytes_of(tensor.detach().contiguous()))
        target.flush()
        return entries


def open_pickles(folder: Path) -> PickleFolder:
    """The pickled weights of a folder; QKGuardError where they hold more than a flat dict of plain tensors."""
    if (folder / PICKLE_SINGLE).is_file():
        files = {PICKLE_SINGLE: _load(folder / PICKLE_SINGLE)}
        where = dict.fromkeys(files[PICKLE_SINGLE], PICKLE_SINGLE)
    else:
        where = read_index(folder / PICKLE_INDEX)
        files = {name: _load(folder / name) for name in sorted(set(where.values()))}
        if lost := [name for name, file in where.items() if name not in files[file]]:
            raise QKGuardError(f"{folder / where[lost[0]]} lacks {lost[0]}, which {PICKLE_INDEX} promises")
    return PickleFolder(folder, files, where)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files of before torch 1.6 cannot be mapped
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise QKGuardError(f"{path} cannot be loaded weights-only: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) and t.dtype in PLAIN for t in state.values()):
        raise QKGuardError(f"{path} is not a plain state dict of unquantised tensors; save it as safetensors")
    return state
