"""What a merge changes in a base's files: every tensor that an adapter touches, read, merged and written by itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkguard.adapters.files import ADAPTER_CONFIG, ADAPTER_TENSORS, Adapter
from qkguard.adapters.meta_model import AdaptedParam, MergeStep, MetaPeftModel
from qkguard.arrays import as_tensor, sha256_of
from qkguard.checkpoint.added import index_with, with_added
from qkguard.checkpoint.files import auxiliary_files
from qkguard.checkpoint.manifest import describe_file, public_name
from qkguard.checkpoint.restored import MOST_AT_ONCE, describe_rows
from qkguard.checkpoint.safetensors_io import SafetensorsWriter, write_rows
from qkguard.checkpoint.weights import INDEX_FILE, BaseFolder, WeightFolder, identify
from qkguard.checkpoint.write import (
    FilePlan,
    FolderPlan,
    OpenFile,
    Patch,
    Record,
    plan_files,
)
from qkguard.drift import Sums, drift_of_blocks, weight_blocks
from qkguard.layout.rows import RowSelection
from qkguard.layout.selection import Selection
from qkguard.layout.spec import Block, ParamMap
from qkguard.layout.wrappers import wrapped_names
from qkguard.offline.pair import tensor_names
from qkguard.offline.whole import embeddings_apart

ROOM = 1 << 30  # bytes for the tensors that are merged at the same time
BYTES_EACH = (
    14  # of memory for each of their values in bfloat16: read, LoRA's product before and after scaling, result
)
_BASE_CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Merge:
    """An adapter bound to its base's files.

    Attributes:
        weights, base_id: the base's files, and what the user called it.
        adapter, peft_model: the adapter's folder, and the adapter on the base's class.
        selection, qk: the queries and keys by layer (`layout.select`) and by parameter name.
        qk_share: how much of their adapters is merged: 1 all, 0 nothing.
        names: parameter name -> tensor name in the base's files: adapted parameters, queries and keys.
        drift: what the whole adapter does to weights of queries and keys, by name, as far as `note_drift` was called.
    """

    weights: WeightFolder
    base_id: str
    adapter: Adapter
    peft_model: MetaPeftModel
    selection: Selection
    qk: Mapping[str, ParamMap]
    qk_share: float
    names: Mapping[str, str]
    drift: dict[str, list[tuple[Block, Sums]]] = field(default_factory=dict)

    @property
    def untied(self) -> dict[str, tuple[AdaptedParam, tuple[MergeStep, ...]]]:
        """Names that shared a tensor with an adapted parameter and now get one of their own."""
        return {name: (param, steps) for param in self.peft_model.adapted for name, steps in param.untied}

    def read(self, param: AdaptedParam) -> Tensor:
        """The base's whole tensor."""
        return as_tensor(self.weights.read(self.names[param.name], _whole(param)))


def bind(
    weights: WeightFolder,
    adapter: Adapter,
    selection: Selection,
    *,
    base_id: str,
    qk_share: float,
    by_hand: bool,
    trust_remote_code: bool,
) -> Merge:
    """Put the adapter on its base's class and find every tensor it changes; `by_hand`: the layout's names were given.

    Raises:
        QKGuardError: the adapter does not fit the base, or a tensor it changes is quantised.
    """
    folder = weights.folder
    peft_model = MetaPeftModel(folder, adapter, trust_remote_code=trust_remote_code)
    qk = {param.name: param for _, params in selection for param in params}
    adapted = [_whole(param) for param in peft_model.adapted]
    names = tensor_names(list(qk.values()), weights, folder, by_hand=by_hand, trust_remote_code=trust_remote_code)
    if adapted:
        names = names | tensor_names(adapted, weights, folder, trust_remote_code=trust_remote_code)
    for param in adapted:
        weights.dtype(names[param.name])  # a quantised tensor is refused here, before anything is written
    return Merge(weights, base_id, adapter, peft_model, selection, qk, qk_share, names)


def plan_merge(merge: Merge, out: Path, chosen: RowSelection, *, overwrite: bool = False) -> FolderPlan:
    """The plan of the merged folder; `chosen` is what the selection was made with, for the manifest."""
    weights, adapter = merge.weights, merge.adapter
    patches: dict[str, list[Patch]] = {}
    for index, param in enumerate(merge.peft_model.adapted):
        rows = rows_to_write(merge, param)
        if rows is not None:
            entry = weights.entry(merge.names[param.name])
            patch = Patch(partial(merge_rows, merge, index), entry.start, entry.stop, rows.whole)
            patches.setdefault(weights.where[entry.name], []).append(patch)
    files = plan_files(weights, patches, wrapped_names(weights.where))
    others: dict[str, Path | str] = {  # tokenizer and templates as training saved them, where it did
        name: adapter.folder / name for name in auxiliary_files(adapter.folder)[0] if name not in _BASE_CONFIGS
    }
    if merge.untied:
        files = _with_untied(merge, files)
        others |= {INDEX_FILE: _untied_index(merge, files), "config.json": _untied_config(weights.folder)}
    method = {"name": "merge", "keep_qk": merge.qk_share == 1, "alpha": 1 - merge.qk_share, **chosen.to_json()}
    return FolderPlan(
        weights,
        out,
        files,
        base=BaseFolder(weights, merge.names, merge.base_id).describe(),
        method=method,
        at_once=_at_once(merge),
        warnings=list(_warnings(merge)),
        other_files=others,
        cards=[adapter.folder],
        overwrite=overwrite,
    )


def _at_once(merge: Merge) -> int:
    """How many tensors may be merged at the same time: as many as there are processors and room for."""
    largest = max((prod(param.shape) for param in merge.peft_model.adapted), default=1)
    return max(1, min(MOST_AT_ONCE, os.cpu_count() or 1, ROOM // (BYTES_EACH * largest)))


def rows_to_write(merge: Merge, param: AdaptedParam) -> ParamMap | None:
    """The rows of a parameter that differ from the base in the output; None where none does."""
    qk = merge.qk.get(param.name)
    if qk is None or merge.qk_share > 0:
        return _whole(param)
    blocks, position = [], 0
    for lo, hi in (*qk.ranges, (qk.shape[qk.dim],) * 2):
        if position < lo:
            blocks.append(Block(position, lo, "v"))
        position = hi
    return ParamMap(qk.name, qk.shape, qk.dim, qk.kind, tuple(blocks)) if blocks else None


def merged_weight(merge: Merge, param: AdaptedParam, weight: Tensor) -> Tensor:
    """The full parameter to write, from the base's `weight`."""
    model, share, qk = merge.peft_model, merge.qk_share, merge.qk.get(param.name)
    full = model.merged(param, weight)
    if qk is None:
        return full
    note_drift(merge, qk, weight, full)
    if share == 1:
        return full
    if share == 0:
        mixed = weight
    elif all(step.kind in ("lora", "bias") and not step.dora for step in param.steps):
        mixed = model.merged(param, weight, scale=share)
    else:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        before = weight.to(wide)
        mixed = (before + share * (model.merged(param, before) - before)).to(weight.dtype)
    if full is weight:
        full = weight.clone()
    qk.put(full, qk.take(mixed))
    return full


def merge_rows(merge: Merge, index: int, file: OpenFile) -> Record:
    """Patch one adapted parameter in the file that holds it."""
    param = merge.peft_model.adapted[index]
    rows = rows_to_write(merge, param)
    assert rows is not None
    entry, weight = file.tensors[merge.names[param.name]], merge.read(param)
    before, after = rows.take(weight), rows.take(merged_weight(merge, param, weight))
    write_rows(file.fd, entry, rows, after)
    hashes = {"sha256_before": sha256_of(before), "sha256_after": sha256_of(after)}
    tensor = {"index": index, "file": file.name} | describe_rows(rows, entry)
    tensor |= {"roles": "", "changed_by": [step.kind for step in param.steps] or ["copied"]}
    return {"tensors": [tensor | hashes]}


def note_drift(merge: Merge, qk: ParamMap, weight: Tensor, whole: Tensor) -> None:
    """Keep in `merge.drift` how far the whole adapter moves a parameter's queries and keys."""
    before, after = qk.take(weight), qk.take(whole)
    merge.drift[qk.name] = weight_blocks([qk], {qk.name: before}, {qk.name: after})


def note_unwritten(merge: Merge) -> None:
    """`note_drift` for the queries and keys that stay the base's whole, and for those that are not adapted.

    For a thread beside those that write: it is the rest of the work.
    """
    adapted = {param.name: param for param in merge.peft_model.adapted}
    for name, qk in merge.qk.items():
        param = adapted.get(name, AdaptedParam(name, qk.shape, ()))
        if name not in adapted or rows_to_write(merge, param) is None:
            weight = merge.read(param)
            note_drift(merge, qk, weight, merge.peft_model.merged(param, weight))


def layer_drifts(merge: Merge) -> Iterator[dict[str, Any]]:
    """What the whole adapter does to the queries and keys, layer by layer, once every parameter's drift is noted."""
    adapted = {param.name for param in merge.peft_model.adapted}
    for index, (spec, params) in enumerate(merge.selection):
        blocks = [block for param in params for block in merge.drift[param.name]]
        yield (
            {"index": index, "layer": spec.layer, "module": spec.module, "kind": spec.kind}
            | {"drift": drift_of_blocks(blocks), "adapted": [p.name for p in params if p.name in adapted]}
        )


def _with_untied(merge: Merge, files: tuple[FilePlan, ...]) -> tuple[FilePlan, ...]:
    """One more file, for tensors that the base does not have."""
    return with_added(merge.weights, files, [FilePlan(None, "", 0, make=partial(_write_untied, merge))], "untied")


def _write_untied(merge: Merge, target: Path) -> Record:
    dtypes = {name: merge.weights.dtype(merge.names[param.name]) for name, (param, _) in merge.untied.items()}
    writer = SafetensorsWriter(target, {n: (dtypes[n], param.shape) for n, (param, _) in merge.untied.items()})
    for param, steps in merge.untied.values():
        writer.write(merge.peft_model.merged(param, merge.read(param), steps))
    writer.close()
    return {}


def _untied_index(merge: Merge, files: tuple[FilePlan, ...]) -> str:
    entries = {name: merge.weights.entry(merge.names[param.name]) for name, (param, _) in merge.untied.items()}
    added = {name: (files[-1].target, entry.stop - entry.start) for name, entry in entries.items()}
    return index_with(merge.weights, files, added)


def _untied_config(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    nested = config.get("text_config")
    config["tie_word_embeddings"] = False
    if isinstance(nested, dict) and "tie_word_embeddings" in nested:
        nested["tie_word_embeddings"] = False
    return json.dumps(config, indent=2) + "\n"


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """What the manifest says of the adapter."""
    return {
        "id": public_name(identify(str(adapter.folder), adapter.folder)["id"]),
        "base": public_name(adapter.base) if adapter.base else None,
        "config_sha256": hashlib.sha256((adapter.folder / ADAPTER_CONFIG).read_bytes()).hexdigest(),
        **describe_file(adapter.folder / ADAPTER_TENSORS, adapter.header),
    }


def _warnings(merge: Merge) -> Iterator[str]:
    yield from embeddings_apart(merge.weights)
    named, untied = merge.adapter.base, merge.untied
    same = named and identify(named, Path(named))["id"] == identify(merge.base_id, merge.weights.folder)["id"]
    if named and not same:
        onto = public_name(merge.base_id)
        another = f"another model called {onto}" if onto == public_name(named) else onto
        yield f"the adapter names {public_name(named)} as its base; it was merged onto {another}"
    if untied:
        yield (
            f"{', '.join(untied)} was trained or kept apart from what it had been tied to: the merged model's "
            "embeddings are no longer tied"
        )
    if merge.qk_share < 1 and not any(param.name in merge.qk for param in merge.peft_model.adapted):
        yield "the adapter does not touch queries and keys: leaving them out changes nothing"


def _whole(param: AdaptedParam) -> ParamMap:
    shape = param.shape
    return ParamMap(param.name, shape, 0, "weight" if len(shape) > 1 else "bias", (Block(0, shape[0], "v"),))
