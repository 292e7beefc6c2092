"""Tensors of the base that the raw folder lacks, copied into files of their own in the restored one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from qkguard.arrays import bytes_of, cast, dtype_name
from qkguard.checkpoint.added import index_with, with_added
from qkguard.checkpoint.safetensors_io import FLOATS, SafetensorsWriter, opened, read_exactly
from qkguard.checkpoint.scaled import INTEGERS, SCALES, ScaledTensor, find_scaled
from qkguard.checkpoint.weights import INDEX_FILE, SCAN_BYTES, WeightFolder
from qkguard.checkpoint.write import FilePlan, FolderPlan, Record
from qkguard.layout.spec import Block, ParamMap
from qkguard.layout.wrappers import bare_name

SHARD_BYTES = 5 * 10**9  # as save_pretrained's
DTYPES = FLOATS | INTEGERS


@dataclass(frozen=True)
class CarriedTensor:
    """One tensor of the base: its name there and in the new folder, and the dtype and shape to write."""

    source: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    scaled: ScaledTensor | None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def with_carried(plan: FolderPlan, base: WeightFolder, names: Sequence[str], dtype: np.dtype) -> FolderPlan:
    """The plan with these tensors of the base beside those of the raw folder.

    Plain ones keep dtype and bytes; quantised ones are dequantised with their scales (`scaled`), because the raw
    folder's config says nothing of these.

    Args:
        plan: of a restored folder.
        base: the base, opened.
        names: its tensors to carry over.
        dtype: what dequantised ones are written in.

    Raises:
        QKGuardError: a tensor in a dtype, or quantised in a way, that is not known here.
    """
    tensors = {tensor.name: tensor for tensor in (_tensor(base, name, dtype) for name in names)}
    split = split_state_dict_into_shards_factory(
        tensors, get_storage_size=_nbytes, filename_pattern="{suffix}", max_shard_size=SHARD_BYTES
    )
    shards = [
        sorted((tensors[name] for name in found), key=_widest_first) for found in split.filename_to_tensors.values()
    ]
    added = [FilePlan(None, "", sum(map(_nbytes, shard)), make=partial(_write, base, shard)) for shard in shards]
    files = with_added(plan.weights, plan.files, added, "carried")
    where = {
        tensor.name: (file.target, tensor.nbytes)
        for file, shard in zip(files[-len(shards) :], shards, strict=True)
        for tensor in shard
    }
    index = {plan.weights.index or INDEX_FILE: index_with(plan.weights, files, where)}
    return replace(plan, files=files, other_files={**plan.other_files, **index})


def _tensor(base: WeightFolder, source: str, dtype: np.dtype) -> CarriedTensor:
    entry = base.entry(source)
    plain = entry.dtype in INTEGERS and not any(source + end in base.where for end in SCALES)
    scaled = None if plain else find_scaled(base, source)
    if scaled is not None:
        return CarriedTensor(source, bare_name(source), dtype, entry.shape, scaled)
    return CarriedTensor(source, bare_name(source), np.dtype(DTYPES[entry.dtype]), entry.shape, None)


def _nbytes(tensor: Any) -> int:
    return int(tensor.nbytes)


def _widest_first(tensor: CarriedTensor) -> tuple[int, str]:
    """So that each tensor of a file starts at a multiple of its items' size."""
    return -tensor.dtype.itemsize, tensor.name


def _write(base: WeightFolder, tensors: Sequence[CarriedTensor], target: Path) -> Record:
    """Write one file of them; what the manifest says of each."""
    writer = SafetensorsWriter(target, {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})
    described = []
    for tensor in tensors:
        digest = hashlib.sha256()
        writer.write_pieces(_hashed(_pieces(base, tensor), digest))
        about: Record = {"name": tensor.name, "file": target.name, "dtype": dtype_name(tensor.dtype)}
        about |= {"shape": list(tensor.shape), "dequantised": tensor.scaled is not None}
        described.append(about | {"sha256": digest.hexdigest()})
    writer.close()
    return {"carried": described}


def _hashed(pieces: Iterator[np.ndarray], digest: Any) -> Iterator[np.ndarray]:
    for piece in pieces:
        digest.update(bytes_of(piece))
        yield piece


def _pieces(base: WeightFolder, tensor: CarriedTensor) -> Iterator[np.ndarray]:
    """A tensor's elements in order, a few MB at a time."""
    if tensor.scaled is not None:
        rows, columns = tensor.shape
        step = max(1, SCAN_BYTES // (4 * columns))
        for start in range(0, rows, step):
            band = Block(start, min(rows, start + step), "v")
            yield cast(tensor.scaled.read(ParamMap(tensor.source, tensor.shape, 0, "weight", (band,))), tensor.dtype)
        return
    entry = base.entry(tensor.source)
    with opened(base.folder / base.where[tensor.source]) as fd:
        for offset in range(entry.start, entry.stop, SCAN_BYTES):
            piece = np.empty(min(SCAN_BYTES, entry.stop - offset), np.uint8)
            read_exactly(fd, bytes_of(piece), offset, tensor.source)
            yield piece.view(tensor.dtype)
