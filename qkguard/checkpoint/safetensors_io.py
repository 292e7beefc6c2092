"""safetensors files at byte level: headers, a few rows read or overwritten in place, a file written tensor by tensor.

The safetensors library reads whole tensors and writes whole files. Restoring touches a few per cent of a checkpoint,
so this module works on the format itself (8 bytes little-endian header length, JSON header, then the tensors' bytes
without gaps) and never holds more than the rows asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from qkguard.arrays import BFLOAT16, Array, bytes_of, dtype_name
from qkguard.errors import QKGuardError
from qkguard.layout.spec import ParamMap

FLOATS = {"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": BFLOAT16}
"""Dtypes whose rows can be restored; everything else in a Q/K tensor is a quantised or broken checkpoint."""

NAMES = {dtype_name(dtype): name for name, dtype in FLOATS.items()} | {
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""What the dtypes of numpy and torch are called in a header, by their common name."""

_NAMES_BY_BITS = {
    64: "F64 I64 U64 C64",
    32: "F32 I32 U32",
    16: "F16 BF16 I16 U16",
    8: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    6: "F6_E2M3 F6_E3M2",
    4: "F4",
}
BITS = {name: bits for bits, names in _NAMES_BY_BITS.items() for name in names.split()}
MAX_HEADER = 100_000_000  # bytes: the safetensors library's own limit
SAMPLES, SAMPLE_BYTES = 256, 4096


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file; `start:stop` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def float_dtype(self) -> np.dtype:
        """The dtype of a restorable tensor; QKGuardError for quantised ones."""
        if self.dtype not in FLOATS:
            raise QKGuardError(
                f"{self.name} is stored as {self.dtype}, which is a quantised format: expected one of "
                f"{', '.join(FLOATS)}. Use the unquantised checkpoint."
            )
        return FLOATS[self.dtype]


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file, checked against the file's size."""

    path: Path
    size: int
    sha256: str
    tensors: Mapping[str, TensorEntry]

    @property
    def data_start(self) -> int:
        """The byte at which the tensors begin."""
        return min((entry.start for entry in self.tensors.values()), default=self.size)


def read_header(path: Path) -> Header:
    """Read and check a header: complete, tensors back to back, file neither shorter nor longer than it says.

    Raises:
        QKGuardError: no such file, not safetensors, truncated or corrupt.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
                raise QKGuardError(f"{path} is not a safetensors file or is truncated ({size} bytes). Write it again.")
            raw = file.read(length)
    except FileNotFoundError:
        raise QKGuardError(f"{path} is missing. Download or save the checkpoint again.") from None
    except OSError as error:
        raise QKGuardError(f"Cannot read {path}: {error.strerror}.") from error
    tensors = _parse(path, raw, 8 + length)
    expected = max((entry.stop for entry in tensors.values()), default=8 + length)
    if size != expected:
        what = "truncated" if size < expected else "longer than its header says"
        raise QKGuardError(f"{path} is {what}: {size} bytes, expected {expected}. Download or save it again.")
    return Header(path, size, hashlib.sha256(prefix + raw).hexdigest(), tensors)


def _parse(path: Path, raw: bytes, data_start: int) -> dict[str, TensorEntry]:
    tensors = {}
    try:
        for name, info in json.loads(raw).items():
            if name != "__metadata__":
                lo, hi = info["data_offsets"]
                entry = TensorEntry(name, info["dtype"], tuple(info["shape"]), data_start + lo, data_start + hi)
                if entry.dtype in BITS and (hi - lo) * 8 != prod(entry.shape) * BITS[entry.dtype]:
                    raise ValueError(f"{name} has {hi - lo} bytes for {entry.dtype} {entry.shape}")
                tensors[name] = entry
        position = data_start
        for entry in sorted(tensors.values(), key=attrgetter("start", "stop")):
            if entry.start != position or entry.stop < entry.start:
                raise ValueError(f"{entry.name} does not start where the tensor before it ends")
            position = entry.stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QKGuardError(f"{path} has a corrupt safetensors header ({error}). Download or save it again.") from None
    return tensors


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file descriptor for reading."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def read_tensor(fd: int, entry: TensorEntry) -> np.ndarray:
    """One whole tensor in the file's dtype."""
    out = np.empty(entry.shape, dtype=entry.float_dtype)
    read_exactly(fd, bytes_of(out), entry.start, entry.name)
    return out


def read_rows(fd: int, entry: TensorEntry, param: ParamMap) -> np.ndarray:
    """The selected rows (or columns) of one tensor as a compact array in the file's dtype."""
    compact = np.empty(param.compact_shape, dtype=entry.float_dtype)
    view = bytes_of(compact)
    for offset, piece in _pieces(entry, param, view):
        read_exactly(fd, piece, offset, entry.name)
    return compact


def write_rows(fd: int, entry: TensorEntry, param: ParamMap, compact: Array) -> None:
    """Overwrite the selected rows (or columns) of one tensor in place.

    `compact`, an array or a CPU tensor, has shape `param.compact_shape` and the file's dtype.
    """
    found, wanted = dtype_name(compact.dtype), dtype_name(entry.float_dtype)
    if found != wanted or tuple(compact.shape) != param.compact_shape:
        raise QKGuardError(
            f"{entry.name}: rows of {found} {tuple(compact.shape)} do not fit {wanted} {param.compact_shape}."
        )
    for offset, piece in _pieces(entry, param, bytes_of(compact)):
        while piece:
            written = os.pwrite(fd, piece, offset)
            piece, offset = piece[written:], offset + written


def _pieces(entry: TensorEntry, param: ParamMap, view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Pieces of a compact tensor's bytes with their byte offsets in the file: a few for rows, many for columns."""
    if entry.shape != param.shape:
        raise QKGuardError(
            f"{entry.name} has shape {list(entry.shape)}, expected {list(param.shape)} ({param.name}): "
            "the checkpoint belongs to another model."
        )
    itemsize, position = entry.float_dtype.itemsize, 0
    for lo, hi in param.flat_ranges(0, param.full_numel):
        size = (hi - lo) * itemsize
        yield entry.start + lo * itemsize, view[position : position + size]
        position += size


def rename_tensors(fd: int, renamed: Mapping[str, str]) -> None:
    """Rename tensors in an open file's header, in place.

    The names must not get longer: the header keeps its length, filled up with spaces as the format allows, so that
    no tensor moves.
    """
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    raw = bytearray(length)
    read_exactly(fd, memoryview(raw), 8, "header")
    header = {renamed.get(name, name): info for name, info in json.loads(raw).items()}
    view = memoryview(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))
    assert len(view) == length, "a name became longer"
    offset = 8
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def read_exactly(fd: int, view: memoryview, offset: int, what: str) -> None:
    """Fill `view` from byte `offset` of an open file."""
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise QKGuardError(f"{what}: the file ended early: it was changed while it was read.")
        view, offset = view[count:], offset + count


def sample_sha256(fd: int, size: int) -> str:
    """A hash of 256 blocks of 4 KiB spread over the file (all of it, where it is smaller).

    Reading every byte of a large checkpoint would cost more than writing it did; another training, a partial copy or
    a file of zeros changes every block.
    """
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    if size <= SAMPLES * SAMPLE_BYTES:
        starts, length = [0], size
    else:
        starts, length = [i * (size - SAMPLE_BYTES) // (SAMPLES - 1) for i in range(SAMPLES)], SAMPLE_BYTES
    buffer = bytearray(length)
    for start in starts:
        read_exactly(fd, memoryview(buffer), start, "sample")
        digest.update(buffer)
    return digest.hexdigest()


class SafetensorsWriter:
    """A safetensors file written one tensor at a time, so that memory stays at the largest tensor.

    The header of name -> (dtype of numpy or torch, shape) is written first, the tensors then in that order; `close`
    makes the file durable. A write that fails (no space) is kept and raised by `close`, which then removes the file:
    the caller's ranks may be gathering the next tensors together by then, and one of them must not leave the others
    waiting.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[Any, tuple[int, ...]]]) -> None:
        self.path, self._pending = path, list(tensors.items())
        self._failure: OSError | None = None
        self._file = open(path, "wb")  # noqa: SIM115 - closed in `close`
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, (dtype, shape) in tensors.items():
            stop = start + prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype_name(dtype)], "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, rows: Array) -> None:
        """Write the next array or tensor, from any device."""
        name, (dtype, shape) = self._pending.pop(0)
        expected, found = (dtype_name(dtype), tuple(shape)), (dtype_name(rows.dtype), tuple(rows.shape))
        assert found == expected, (name, expected, found)
        self._write(rows)

    def _write(self, rows: Array) -> None:
        if self._failure is None:
            try:
                self._file.write(bytes_of(rows if isinstance(rows, np.ndarray) else rows.detach().cpu()))
            except OSError as error:
                self._failure = error

    def write_pieces(self, pieces: Iterable[Array]) -> None:
        """Write the next tensor from arrays of its dtype that follow one another, of any shapes."""
        name, (dtype, shape) = self._pending.pop(0)
        count = 0
        for piece in pieces:
            assert dtype_name(piece.dtype) == dtype_name(dtype), (name, dtype, piece.dtype)
            count += prod(piece.shape)
            self._write(piece)
        assert count == prod(shape), (name, shape, count)

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
            raise QKGuardError(f"Cannot write {self.path}: {self._failure.strerror}. Free some space and try again.")
