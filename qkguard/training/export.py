"""Live weights -> a folder that `from_pretrained` loads, where Trainer leaves none (ZeRO-3 without gather-on-save).

Sharded parameters are gathered one at a time to rank 0, which streams them to disk: memory stays at the largest
parameter. Models whose files differ from memory by more than names go through `save_pretrained` as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from qkguard.checkpoint.files import copy_auxiliary, copy_named, link_or_copy, write_text
from qkguard.checkpoint.safetensors_io import SafetensorsWriter
from qkguard.checkpoint.staging import Staging
from qkguard.checkpoint.weights import INDEX_FILE, SINGLE_FILE, weight_map
from qkguard.distributed import ranks, sharding

SHARD_BYTES = 5 * 10**9


def holds_weights(folder: Path) -> bool:
    """Whether Trainer left model weights in Hugging Face's format in a checkpoint folder."""
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def link_checkpoint(raw: Path, out: Path, staging: Path | None = None) -> None:
    """Another name for a checkpoint's model: weights hard-linked where possible, tokenizer and configs copied.

    Training state stays behind; the folder appears whole or not at all, replacing an older one.
    """
    index, where = weight_map(raw)
    with Staging(out, staging) as made:
        for name in sorted(set(where.values())):
            link_or_copy(raw / name, made.folder / name)
        if index is not None:
            copy_named(raw / index, made.folder / index)
        copy_auxiliary(raw, made.folder)
        made.publish()


def export_model(model: Any, folder: Path, processing_class: Any = None, staging: Path | None = None) -> None:
    """Write the live model to `folder`, replacing it; a collective (ALL ranks), the files are rank 0's.

    The folder is assembled in `staging` (as in `FolderPlan`) and appears under its name only when it is whole. Dtypes
    are those of the weights the forward uses.
    """
    model = sharding.unwrap(model)
    made = ranks.held_by(0, f"preparing {folder}", partial(Staging, folder, staging))
    place = made.folder if made else folder  # only rank 0 writes

    def finish() -> None:
        if processing_class is not None:
            processing_class.save_pretrained(place)
        if made is not None:
            made.publish()

    with made or nullcontext():
        if sharding.backend(model) in ("single", "replicated"):
            ranks.held_by(0, f"writing {folder}", partial(model.save_pretrained, place))
        else:
            _export_sharded(model, place)
        ranks.held_by(0, f"finishing {folder}", finish)


def _export_sharded(model: Any, folder: Path) -> None:
    """Gather and write one parameter after another; a collective (ALL ranks), the files are rank 0's."""
    entries = _state_entries(model)
    on_disk = {name: torch.empty(_shape(value), dtype=_dtype(value), device="meta") for name, value in entries.items()}
    # Not part of transformers' public interface (5.17): tells whether this model's files differ from memory.
    on_disk = revert_weight_conversion(model, on_disk)
    if set(on_disk) != set(entries):
        _export_whole(model, folder, entries)
        return

    deferred = ranks.Deferred(f"writing {folder}")
    here = ranks.rank() == 0
    if here:
        deferred.run(partial(_save_configuration, model, folder))
    split = split_state_dict_into_shards_factory(
        entries, get_storage_size=_nbytes, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
    )
    gathered = _gathered([entries[name] for names in split.filename_to_tensors.values() for name in names], deferred)
    for file, names in split.filename_to_tensors.items():
        layout = {name: (_dtype(entries[name]), _shape(entries[name])) for name in names}
        writer = deferred.run(partial(SafetensorsWriter, folder / file, layout)) if here else None
        for _ in names:
            tensor = next(gathered)  # on all ranks, whatever happens to the file
            if tensor is not None and writer is not None:
                deferred.run(partial(writer.write, tensor))
        if writer is not None:
            deferred.run(writer.close)
    if here and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        deferred.run(partial(write_text, folder / INDEX_FILE, json.dumps(index, indent=2)))
    deferred.agree()


def _export_whole(model: Any, folder: Path, entries: dict[str, Tensor]) -> None:
    """Gather everything on rank 0 and let transformers write it; a collective (ALL ranks)."""
    deferred = ranks.Deferred(f"writing {folder}")
    full = {}
    for name, tensor in zip(entries, _gathered(list(entries.values()), deferred), strict=True):
        if tensor is not None:
            full[name] = tensor
    if ranks.rank() == 0:
        deferred.run(partial(model.save_pretrained, folder, state_dict=full))
    deferred.agree()


def _save_configuration(model: Any, folder: Path) -> None:
    """Everything `save_pretrained` writes but the weights: config, generation config, remote code."""
    model.save_pretrained(folder, state_dict={})
    for file in (SINGLE_FILE, INDEX_FILE):
        (folder / file).unlink(missing_ok=True)


def _state_entries(model: Any) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers, by their name in the state dict."""
    # Private, and what `save_pretrained` itself goes by: transformers keeps here what its files leave out (5.17), and
    # torch offers no other way to tell persistent buffers from the rest (2.11).
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    entries = {n: p for n, p in model.named_parameters() if n not in ignored}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if name not in module._non_persistent_buffers_set and full not in ignored and buffer is not None:
                entries[full] = buffer
    return entries


def _gathered(values: list[Tensor], deferred: ranks.Deferred) -> Iterator[Tensor | None]:
    """Full tensors on rank 0 in order: parameters gathered, buffers (the same everywhere) as they are.

    A collective: ALL ranks must take every tensor.
    """
    gathered = sharding.gather_full([v for v in values if isinstance(v, nn.Parameter)], deferred)
    for value in values:
        yield next(gathered) if isinstance(value, nn.Parameter) else (value.cpu() if ranks.rank() == 0 else None)


def _shape(value: Any) -> tuple[int, ...]:
    return sharding.full_shape(value) if isinstance(value, nn.Parameter) else tuple(value.shape)


def _dtype(value: Any) -> torch.dtype:
    return sharding.dtype(value) if isinstance(value, nn.Parameter) else value.dtype


def _nbytes(value: Any) -> int:
    return prod(_shape(value)) * _dtype(value).itemsize
