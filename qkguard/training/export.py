"""Live weights -> a folder that `from_pretrained` loads, where Trainer leaves none (ZeRO-3 without gather-on-save).

Sharded parameters are gathered one at a time to rank 0, which streams them to disk: memory stays at the largest
parameter. Models whose files differ from memory by more than names go through `save_pretrained` as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from qkguard.checkpoint.auxiliary import auxiliary_files
from qkguard.checkpoint.files import copy_named, link_or_copy, published
from qkguard.checkpoint.safetensors_writer import SafetensorsWriter
from qkguard.checkpoint.weights import INDEX, open_weights
from qkguard.checkpoint.weights import SINGLE as WEIGHTS
from qkguard.distributed import ranks, sharding

SHARD_BYTES = 5 * 10**9


def holds_weights(folder: Path) -> bool:
    """Whether Trainer left model weights in Hugging Face's format in a checkpoint folder."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def link_checkpoint(raw: Path, out: Path) -> None:
    """Another name for a checkpoint's model: weights hard-linked where possible, tokenizer and configs copied.

    Training state stays behind; the folder appears whole or not at all, replacing an older one.
    """
    weights = open_weights(raw)
    with published(out) as (folder, mode):
        for name in [*weights.files, *([INDEX] if (raw / INDEX).is_file() else [])]:
            link_or_copy(raw / name, folder / name, mode)
        for name in auxiliary_files(raw)[0]:
            copy_named(raw, name, folder)


def export_model(model: Any, folder: Path, processing_class: Any = None) -> None:
    """Write the live model to `folder`, replacing it; a collective (ALL ranks), the files are rank 0's.

    The folder appears under its name only when it is whole. Dtypes are those of the weights the forward uses.
    """
    model = sharding.unwrap(model)
    partial = folder.with_name(f"_{folder.name}.partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    ranks.on_rank_zero(f"preparing {folder}", begin)
    if sharding.backend(model) in ("single", "replicated"):
        ranks.on_rank_zero(f"writing {folder}", lambda: model.save_pretrained(partial))
    else:
        _export_sharded(model, partial)

    def finish() -> None:
        if processing_class is not None:
            processing_class.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)

    ranks.on_rank_zero(f"finishing {folder}", finish)


def _export_sharded(model: Any, folder: Path) -> None:
    entries = _state_entries(model)
    on_disk = {name: torch.empty(_shape(value), dtype=_dtype(value), device="meta") for name, value in entries.items()}
    on_disk = revert_weight_conversion(model, on_disk)
    if set(on_disk) != set(entries):
        _export_whole(model, folder, entries)
        return

    ranks.on_rank_zero("writing the model's configuration", lambda: _save_configuration(model, folder))
    shards = _shards(entries)
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    index: dict[str, str] = {}
    for file, shard in zip(names, shards, strict=True):
        layout = {name: (_dtype(entries[name]), _shape(entries[name])) for name in shard}

        def begin(file: str = file, layout: Any = layout) -> SafetensorsWriter:
            return SafetensorsWriter(folder / file, layout)

        writer = ranks.held_by(0, f"opening {file}", begin)
        for tensor in _gathered([entries[name] for name in shard]):
            if tensor is not None and writer is not None:
                writer.write(tensor)
        ranks.on_rank_zero(f"closing {file}", writer.close if writer else lambda: None)
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(_nbytes(value) for value in entries.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        ranks.on_rank_zero("writing the index", lambda: (folder / INDEX).write_text(text))


def _export_whole(model: Any, folder: Path, entries: dict[str, Tensor]) -> None:
    full = {}
    for name, tensor in zip(entries, _gathered(list(entries.values())), strict=True):
        if tensor is not None:
            full[name] = tensor
    ranks.on_rank_zero(f"writing {folder}", lambda: model.save_pretrained(folder, state_dict=full))


def _save_configuration(model: Any, folder: Path) -> None:
    """Everything `save_pretrained` writes but the weights: config, generation config, remote code."""
    model.save_pretrained(folder, state_dict={})
    for file in (WEIGHTS, INDEX):
        (folder / file).unlink(missing_ok=True)


def _state_entries(model: Any) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers, by their name in the state dict."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    entries = {n: p for n, p in model.named_parameters() if n not in ignored}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if name not in module._non_persistent_buffers_set and full not in ignored and buffer is not None:
                entries[full] = buffer
    return entries


def _gathered(values: list[Tensor]) -> Iterator[Tensor | None]:
    """Full tensors on rank 0 in order: parameters gathered, buffers (the same everywhere) as they are."""
    gathered = sharding.gather_full([v for v in values if isinstance(v, nn.Parameter)])
    for value in values:
        yield next(gathered) if isinstance(value, nn.Parameter) else (value.cpu() if ranks.rank() == 0 else None)


def _shards(entries: dict[str, Tensor]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, value in entries.items():
        if shards[-1] and size + _nbytes(value) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(value)
    return shards


def _shape(value: Any) -> tuple[int, ...]:
    return sharding.full_shape(value) if isinstance(value, nn.Parameter) else tuple(value.shape)


def _dtype(value: Any) -> torch.dtype:
    return sharding.dtype(value) if isinstance(value, nn.Parameter) else value.dtype


def _nbytes(value: Any) -> int:
    return prod(_shape(value)) * _dtype(value).itemsize
