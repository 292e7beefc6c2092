"""NaN and Inf in tensors and in whole checkpoints, at the speed of memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import isfinite

import torch
from torch import Tensor

from qkguard.checkpoint.safetensors_io import FLOATS, Header, bytes_of, read_exactly
from qkguard.checkpoint.weights import WeightFolder, opened

CHUNK = 4 << 20  # bytes: stays in the cache between the read and the sum


def has_nonfinite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds NaN or Inf: extremes tell, ten times faster than looking at each value."""
    if not tensor.numel():
        return False
    low, high = tensor.aminmax()  # NaN if there is one
    return not (isfinite(low) and isfinite(high))


class BackgroundScan:
    """Looks through all weights of a folder on a thread of its own, while the main one imports, copies and patches.

    Use as a context manager: leaving it stops the scan. Quantised and integer tensors are skipped.
    """

    def __init__(self, weights: WeightFolder) -> None:
        self._weights, self._stop = weights, threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(lambda: list(self._found()))

    def result(self) -> list[str]:
        """Names of the tensors that hold NaN or Inf; waits for the scan to end."""
        return self._future.result()

    def __enter__(self) -> BackgroundScan:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def _found(self) -> Iterator[str]:
        for file, content in self._weights.files.items():
            with opened(self._weights.folder / file) as fd:
                yield from self._scan_file(fd, content)

    def _scan_file(self, fd: int, header: Header) -> Iterator[str]:
        buffer = torch.empty(CHUNK, dtype=torch.uint8)
        for entry in header.tensors.values():
            if entry.dtype in FLOATS:
                for start in range(entry.start, entry.stop, CHUNK):
                    if self._stop.is_set():
                        return
                    piece = buffer[: min(CHUNK, entry.stop - start)]
                    read_exactly(fd, bytes_of(piece), start, entry.name)
                    if has_nonfinite(piece.view(FLOATS[entry.dtype])):
                        yield entry.name
                        break
