"""A trained adapter -> one without queries and keys that stock PEFT loads, made from the files just saved.

Whole query and key modules lose their tensors and are named in the config's `exclude_modules`. Where one module makes
queries, keys and values together, the query and key rows of `lora_B` become zero, which adds exactly nothing to them.
DoRA has no such form (its norms scale the base rows too): refused by name, merging works.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from peft import get_peft_model_state_dict
from peft.utils.other import get_pattern_key

from qkguard.adapters.files import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    PREFIX,
    check_tensors,
    loadable_name,
    open_adapter,
    scale_rows,
)
from qkguard.adapters.meta_model import quiet
from qkguard.arrays import Array
from qkguard.checkpoint.card import adapter_card, read_card
from qkguard.checkpoint.files import copy_auxiliary, copy_named, link_or_copy, write_text
from qkguard.checkpoint.manifest import FORMAT, MANIFEST, describe_file, dump, public_name, versions
from qkguard.checkpoint.safetensors_io import SafetensorsWriter, read_header
from qkguard.checkpoint.staging import Staging
from qkguard.checkpoint.write import check_target, readable_errors
from qkguard.distributed import ranks, sharding
from qkguard.errors import QKGuardError
from qkguard.layout.selection import Selection
from qkguard.layout.spec import ParamMap


def write_restored_adapter(
    raw: Path,
    out: Path,
    selection: Selection,
    *,
    share: float = 0.0,
    staging: Path | None = None,
    overwrite: bool = False,
    method: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the adapter of `raw` without queries and keys to `out`; returns the manifest. One process.

    Args:
        raw: an adapter folder, never changed.
        out: the folder to appear, complete or not at all.
        selection: the queries and keys, under the live model's or the bare model's names.
        share: how much of the query and key adapters stays: 0 nothing, between 0 and 1 their scaling is multiplied.
        staging, overwrite: as in `checkpoint.write.FolderPlan`.
        method, extra: what the manifest says of the method, and further keys.

    Raises:
        QKGuardError: empty or cut tensors, DoRA on fused or scaled modules, or nothing left to write.
    """
    with prepare_adapter(out, staging, overwrite) as made:
        manifest = assemble_restored_adapter(raw, made, selection, share=share, method=method, extra=extra)
        with readable_errors(out):
            made.publish(replace=overwrite)
    return manifest


def prepare_adapter(out: Path, staging: Path | None = None, overwrite: bool = False) -> Staging:
    """Check the target of a restored adapter and make the temporary folder; one process."""
    check_target([], out, overwrite)
    with readable_errors(out):
        return Staging(out, staging)


def assemble_restored_adapter(
    raw: Path,
    made: Staging,
    selection: Selection,
    *,
    share: float = 0.0,
    method: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`write_restored_adapter` between `prepare_adapter` and the rename."""
    adapter, out = open_adapter(raw, merging=False), made.out
    arrays, config = adapter.arrays(), dict(adapter.config)
    removal = restrict(arrays, config, qk_modules(selection), share)
    with readable_errors(out):
        file = made.folder / ADAPTER_TENSORS
        _save_tensors({loadable_name(key): found for key, found in arrays.items()}, file)
        write_text(made.folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
        auxiliary = copy_auxiliary(raw, made.folder)
        manifest = {
            "format": FORMAT,
            "kind": "adapter",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "base": {"id": public_name(adapter.base) if adapter.base else "unknown"},
            "raw": {
                "path": os.path.relpath(raw.resolve(), out.resolve()),
                "files": {ADAPTER_TENSORS: describe_file(raw / ADAPTER_TENSORS, adapter.header)},
            },
            "method": {"name": "restore", "alpha": 1 - share} | dict(method or {}),
            **removal,
            "files": {ADAPTER_TENSORS: describe_file(file, read_header(file))},
            "companions": [ADAPTER_CONFIG, *auxiliary],
            "warnings": [],
            "versions": versions(),
            **(extra or {}),
        }
        write_text(made.folder / "README.md", adapter_card(manifest, read_card(raw)))
        write_text(made.folder / MANIFEST, dump(manifest))
        made.sync()
    return json.loads(dump(manifest))


def qk_modules(selection: Selection) -> dict[str, ParamMap]:
    """Module name in the base model -> its query and key rows."""
    out = {}
    for _, params in selection:
        for pmap in params:
            if pmap.kind == "weight":
                name = pmap.name.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
                out[name] = pmap
    return out


def restrict(
    arrays: dict[str, np.ndarray], config: dict[str, Any], modules: Mapping[str, ParamMap], share: float
) -> dict[str, Any]:
    """Take queries and keys out of an adapter's tensors and config, in place; says what was removed and changed."""
    removed: list[str] = []
    rows: list[dict[str, Any]] = []
    scaled: dict[str, float] = {}
    for module, pmap in modules.items():
        keys = [key for key in arrays if key.startswith(f"{PREFIX}{module}.lora_")]
        if not keys:
            continue
        if any("lora_magnitude_vector" in key for key in keys) and (share or not pmap.whole):
            raise QKGuardError(f"{no_restored_form(module, share)}. `qkguard merge` writes the merged model.")
        if pmap.whole and not share:
            removed.append(module)
            for key in keys:
                del arrays[key]
        elif pmap.whole:
            # Undocumented (read in PEFT 0.21), but PEFT's own rule for which entry of alpha_pattern holds for a module
            held: dict[str, float] = config.get("alpha_pattern") or {}
            alpha = held.get(get_pattern_key(list(held), module), config["lora_alpha"])
            scaled[re.escape(module)] = share * alpha
        else:
            for key in (k for k in keys if ".lora_B." in k):
                arrays[key] = scale_rows(arrays[key], pmap.ranges, share)
                rows.append({"tensor": key, "ranges": [list(r) for r in pmap.ranges], "factor": share})
    if not any(".lora_" in key for key in arrays):
        raise QKGuardError(
            "The adapter is on queries and keys alone. Without them nothing is left: the restored model is the base."
        )
    if removed:
        config["exclude_modules"] = _excluding(config.get("exclude_modules"), removed)
    if scaled:
        config["alpha_pattern"] = scaled | (config.get("alpha_pattern") or {})  # PEFT takes the first that matches
    return {"removed": removed, "rows": rows, "scaled": {re.sub(r"\\(.)", r"\1", k): v for k, v in scaled.items()}}


def no_restored_form(module: str, share: float) -> str:
    """Why a DoRA adapter cannot be kept in part."""
    what = "with alpha below 1" if share else "on a module that makes more than queries and keys"
    return f"{module}: a DoRA adapter {what} has no restored form that PEFT could load"


def _excluding(held: Any, modules: list[str]) -> Any:
    if isinstance(held, str):
        return "|".join([f"(?:{held})", *map(re.escape, modules)])
    return [*(held or []), *modules]


def copy_adapter(raw: Path, out: Path, staging: Path | None = None) -> None:
    """Another name for an adapter folder (tensors linked where possible), replacing an older one."""
    with Staging(out, staging) as made:
        link_or_copy(raw / ADAPTER_TENSORS, made.folder / ADAPTER_TENSORS)
        copy_named(raw / ADAPTER_CONFIG, made.folder / ADAPTER_CONFIG)
        copy_auxiliary(raw, made.folder)
        made.publish()


def export_adapter(
    model: Any, name: str, folder: Path, processing_class: Any = None, staging: Path | None = None
) -> None:
    """Write one live adapter, gathered a parameter at a time, by rank 0; ALL ranks must call this."""
    mine = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if name in n.split(".")]
    deferred = ranks.Deferred(f"writing the adapter {name}")
    state = {}
    for (key, _), full in zip(mine, sharding.gather_full([p for _, p in mine], deferred), strict=True):
        if full is not None:
            state[key] = full.clone()

    def write() -> None:
        with quiet():
            tensors = get_peft_model_state_dict(
                model, state_dict=state, adapter_name=name, save_embedding_layers=False
            )
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        check_tensors({key: tuple(t.shape) for key, t in tensors.items()}, f"the adapter {name!r}")
        with Staging(folder, staging) as made:
            _save_tensors(tensors, made.folder / ADAPTER_TENSORS)
            _save_config(model, name, made.folder)
            if processing_class is not None:
                processing_class.save_pretrained(made.folder)
            made.publish()

    if ranks.rank() == 0:
        deferred.run(write)
    deferred.agree()


def _save_tensors(tensors: Mapping[str, Array], file: Path) -> None:
    """In the order of `safetensors.torch.save_file`, which makes its files the owner's alone and not durable."""
    ordered = sorted(tensors.items(), key=_widest_first)
    writer = SafetensorsWriter(file, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered})
    for _, tensor in ordered:
        writer.write(tensor)
    writer.close()


def _widest_first(entry: tuple[str, Array]) -> tuple[int, str]:
    return -entry[1].dtype.itemsize, entry[0]


def _save_config(model: Any, name: str, folder: Path) -> None:
    """The adapter's config for inference, naming its base: what `PeftModel.save_pretrained` does to it (0.21).

    That method itself takes tensors as they are, cut into shards, and writes into a folder that readers already see.
    """
    config = model.peft_config[name]
    held = config.inference_mode, config.base_model_name_or_path
    config.inference_mode = True
    # `_name_or_path` is private, and the only place where transformers (5) keeps what a model was loaded from
    config.base_model_name_or_path = held[1] or getattr(model.config, "_name_or_path", None)
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode, config.base_model_name_or_path = held
