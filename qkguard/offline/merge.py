"""Base files + adapter -> a full model, streamed: every tensor that changes is read, merged and written by itself.

The output is the base's files with patches, so what an adapter does not touch is the base byte for byte, and with it
the queries and keys that are left out. Memory: the adapter, one base tensor and its merged copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from qkguard.adapters.files import CONFIG, TENSORS, Adapter, open_adapter
from qkguard.adapters.meta_model import Change, MetaPeftModel
from qkguard.checkpoint.auxiliary import auxiliary_files
from qkguard.checkpoint.card import read_card
from qkguard.checkpoint.files import copy_named, write_text
from qkguard.checkpoint.manifest import build_manifest, describe_file
from qkguard.checkpoint.patched_folder import Job, OpenFile, PatchedFolder, Progress, check_target
from qkguard.checkpoint.restored import describe_rows
from qkguard.checkpoint.safetensors_io import sha256_of, write_rows
from qkguard.checkpoint.safetensors_writer import SafetensorsWriter
from qkguard.checkpoint.sources import FolderSource, identify
from qkguard.checkpoint.weights import INDEX, WeightFolder, open_weights, resolve_folder
from qkguard.drift import projection_drift
from qkguard.errors import QKGuardError
from qkguard.layout.rows import RowOptions, RowSelection
from qkguard.layout.selection import Selection, select
from qkguard.layout.spec import Block, ParamMap
from qkguard.offline.pair import folder_attention, tensor_names

_BASE_CONFIGS = ("config.json", "generation_config.json")
_ADDED = ""  # the raw file of a weight file that the base does not have


def merge_adapter(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keep_qk: bool = False,
    alpha: float = 1.0,
    spec: Any = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **rows: Unpack[RowOptions],
) -> dict[str, Any]:
    """Merge a LoRA adapter into its base model, with queries and keys left as they are in the base.

    Everything merged has the bits of PEFT's `merge_and_unload(safe_merge=True)` on a base held in its files' dtypes.

    Args:
        base, adapter: folders or hub ids; the base unquantised, in safetensors.
        out: the folder to write; it must not exist, or with `overwrite` be an earlier one of qkguard's.
        keep_qk: merge queries and keys too.
        alpha: 1 leaves queries and keys out, 0 merges them, between them LoRA's scaling is multiplied by 1 - alpha
            (for DoRA and trained copies: (1 - alpha) merged + alpha base, rounded once).
        spec: a layout by hand, for models that cannot be probed.
        trust_remote_code: allow the base's own model code to be imported.
        overwrite: replace an earlier folder.
        extra: further keys for the manifest.
        progress: called with (bytes done, bytes in all).
        rows: which rows are queries and keys, as the fields of `RowSelection`.

    Returns:
        The manifest, as written to `out/qkguard.json`.

    Raises:
        QKGuardError: bad input, an adapter that cannot be merged exactly, or a full disk; nothing is left behind.
    """
    if not 0.0 <= alpha <= 1.0:
        raise QKGuardError(f"alpha={alpha} is not between 0 (queries and keys merged) and 1 (left out)")
    if keep_qk and alpha != 1.0:
        raise QKGuardError(f"keep_qk merges queries and keys whole, alpha={alpha} in part; choose one of them")
    sources = [Path(folder) for folder in (base, adapter) if os.path.isdir(folder)]
    check_target(sources, Path(out), overwrite)
    opened_adapter = open_adapter(adapter)
    weights = mergeable_weights(base)
    folder = weights.folder
    specs = folder_attention(folder, spec=spec, trust_remote_code=trust_remote_code)
    chosen = RowSelection.of(rows)
    write = MergeWrite(
        weights,
        Path(out),
        MetaPeftModel(folder, opened_adapter, trust_remote_code=trust_remote_code),
        opened_adapter,
        select(specs, chosen),
        base_id=os.fspath(base),
        qk_share=1.0 if keep_qk else 1.0 - alpha,
        rows=chosen,
        by_hand=spec is not None,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    try:
        write.prepare()
        return write.commit(write.run(progress=progress), extra)
    except BaseException:
        write.abort()
        raise


def mergeable_weights(base: str | os.PathLike[str]) -> WeightFolder:
    """The weights of a base; QKGuardError where no adapter can be merged onto them: no safetensors, or quantised."""
    weights = open_weights(resolve_folder(base))
    for name in weights.where:
        if name.endswith("proj.weight"):
            weights.dtype(name)
    return weights


class MergeWrite(PatchedFolder):
    """One merged model in the making; the steps are those of `PatchedFolder`.

    Args:
        weights, base_id: the base's files, and what the user called it.
        peft_model, adapter: the adapter bound to the base's class, and its folder.
        selection: the queries and keys (`layout.select`).
        qk_share: how much of their adapters is merged: 1 all, 0 nothing.
        rows: the options that `selection` was made with, for the manifest.
        by_hand: the layout's names were given by hand.
        trust_remote_code: allow the base's own model code to be imported.
    """

    def __init__(
        self,
        weights: WeightFolder,
        out: Path,
        peft_model: MetaPeftModel,
        adapter: Adapter,
        selection: Selection,
        *,
        base_id: str,
        qk_share: float,
        rows: RowSelection,
        by_hand: bool = False,
        trust_remote_code: bool = False,
        overwrite: bool = False,
    ) -> None:
        super().__init__(weights, out, overwrite=overwrite)
        self.files = weights
        self.peft_model, self.adapter, self.selection = peft_model, adapter, list(selection)
        self.base_id, self.qk_share, self.chosen = base_id, qk_share, rows
        self.qk = {p.name: p for _, params in self.selection for p in params}
        self.changes = {change.name: change for change in peft_model.changes}
        changed = [_whole(change) for change in self.changes.values()]
        trusted = {"trust_remote_code": trust_remote_code}
        self.names = tensor_names(changed, weights, weights.folder, **trusted) if changed else {}
        self.qk_names = tensor_names(list(self.qk.values()), weights, weights.folder, by_hand=by_hand, **trusted)
        for name in self.names.values():
            weights.dtype(name)  # a quantised tensor is refused here, before anything is written
        self.added = {n: (c, steps) for c in self.changes.values() for n, steps in c.untied}
        self.jobs = self._jobs()
        self.items = list(self.changes.values())

    def _jobs(self) -> list[Job]:
        items: dict[str, set[int]] = {file: set() for file in self.files.files}
        for index, change in enumerate(self.changes.values()):
            if self._rows(change):
                items[self.files.where[self.names[change.name]]].add(index)
        jobs = self.plan(items)
        if not self.added:
            return jobs
        if self.files.index is None:  # one file becomes two and an index
            jobs = [Job(jobs[0].file, "model-00001-of-00002.safetensors", jobs[0].items, jobs[0].nbytes)]
        target = "model-00002-of-00002.safetensors" if self.files.index is None else "model-untied.safetensors"
        return [*jobs, Job(_ADDED, target, (), 0)]

    def _rows(self, change: Change) -> ParamMap | None:
        """The rows of a parameter that differ from the base in the output; None where none does."""
        qk = self.qk.get(change.name)
        if qk is None or self.qk_share > 0:
            return _whole(change)
        blocks, position = [], 0
        for lo, hi in (*qk.ranges, (qk.shape[qk.dim],) * 2):
            if position < lo:
                blocks.append(Block(position, lo, "v"))
            position = hi
        return ParamMap(qk.name, qk.shape, qk.dim, qk.kind, tuple(blocks)) if blocks else None

    def _merged(self, change: Change, weight: Tensor) -> Tensor:
        """The full parameter to write."""
        full = self.peft_model.merged(change, weight)
        qk = self.qk.get(change.name)
        if qk is None or self.qk_share == 1:
            return full
        if self.qk_share == 0:
            mixed = weight
        elif all(step.kind in ("lora", "bias") and not step.dora for step in change.steps):
            mixed = self.peft_model.merged(change, weight, scale=self.qk_share)
        else:
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            before = weight.to(wide)
            mixed = (before + self.qk_share * (self.peft_model.merged(change, before) - before)).to(weight.dtype)
        if full is weight:
            full = weight.clone()
        qk.put(full, qk.take(mixed))
        return full

    def _read(self, name: str) -> Tensor:
        entry = self.files.entry(name)
        return self.files.read(name, ParamMap(name, entry.shape, 0, "weight", (Block(0, entry.shape[0], "v"),)))

    def patch(self, file: OpenFile, hashing: ThreadPoolExecutor) -> None:
        for index in file.job.items:
            change = self.items[index]
            name, rows = self.names[change.name], self._rows(change)
            assert rows is not None
            weight = self._read(name)
            before, after = rows.take(weight), rows.take(self._merged(change, weight))
            hashes = {"before": hashing.submit(sha256_of, before), "after": hashing.submit(sha256_of, after)}
            entry = file.entries[name]
            write_rows(file.fd, entry, rows, after.contiguous())
            kinds = [step.kind for step in change.steps] or ["copied"]
            file.record["tensors"].append(
                {"index": index, "file": file.job.target}
                | describe_rows(rows, entry)
                | {"roles": "", "changed_by": kinds}
                | {f"sha256_{which}": h.result() for which, h in hashes.items()}
            )

    def _layers(self) -> Iterator[dict[str, Any]]:
        """What the whole adapter does to the queries and keys, layer by layer."""
        for index, (spec, params) in enumerate(self.selection):
            pre, post, adapted = {}, {}, []
            for param in params:
                pre[param.name] = post[param.name] = self.files.read(self.qk_names[param.name], param)
                if change := self.changes.get(param.name):
                    full = self.peft_model.merged(change, self._read(self.qk_names[param.name]))
                    post[param.name] = param.take(full)
                    adapted.append(param.name)
            yield (
                {"index": index, "layer": spec.layer, "module": spec.module, "kind": spec.kind}
                | {"drift": projection_drift(params, pre, post), "adapted": adapted}
            )

    def write_file(self, job: Job, mode: int, hashing: ThreadPoolExecutor, tick: Any) -> dict[str, Any]:
        if job.file != _ADDED:
            return super().write_file(job, mode, hashing, tick)
        target = self.staging.path / job.target
        layout = {n: (self.files.dtype(self.names[c.name]), c.shape) for n, (c, _) in self.added.items()}
        writer = SafetensorsWriter(target, layout)
        for change, steps in self.added.values():
            writer.write(self.peft_model.merged(change, self._read(self.names[change.name]), steps))
        writer.close()
        record = {"file": job.file, "target": job.target, "made": "added", "raw": None}
        return record | {"layers": [], "tensors": [], "nonfinite": [], "restored": describe_file(target)}

    def write_index(self, results: Sequence[Mapping[str, Any]]) -> list[str]:
        if not self.added:
            return super().write_index(results)
        targets = {job.file: job.target for job in self.jobs}
        where = {name: targets[file] for name, file in self.files.where.items()} | dict.fromkeys(
            self.added, targets[_ADDED]
        )
        index = {"metadata": {"total_size": sum(r["restored"]["size"] for r in results)}, "weight_map": where}
        write_text(self.staging.path / INDEX, json.dumps(index, indent=2) + "\n")
        return [INDEX]

    def copy_companions(self) -> tuple[list[str], list[str]]:
        """The base's configs; tokenizer and templates as training saved them beside the adapter, where it did."""
        taken, left = auxiliary_files(self.raw)
        mine = [n for n in auxiliary_files(self.adapter.folder)[0] if n not in _BASE_CONFIGS]
        for name in sorted({*taken, *mine}):
            copy_named(self.adapter.folder if name in mine else self.raw, name, self.staging.path)
        if self.added:
            path = self.staging.path / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            nested = config.get("text_config")
            for part in (config, *([nested] if isinstance(nested, dict) and "tie_word_embeddings" in nested else [])):
                part["tie_word_embeddings"] = False
            write_text(path, json.dumps(config, indent=2) + "\n")
        return sorted({*taken, *mine}), left

    def card(self) -> str | None:
        return read_card(self.adapter.folder) or read_card(self.raw)

    def manifest(
        self, results: Sequence[Mapping[str, Any]], taken: list[str], left: list[str], extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        results = [{**results[0], "layers": list(self._layers())}, *results[1:]]
        about = {
            "id": identify(str(self.adapter.folder), self.adapter.folder)["id"],
            "base": self.adapter.base,
            "config_sha256": sha256_of(
                torch.frombuffer(bytearray((self.adapter.folder / CONFIG).read_bytes()), dtype=torch.uint8)
            ),
            **describe_file(self.adapter.folder / TENSORS),
        }
        return build_manifest(
            raw=os.path.relpath(self.raw.resolve(), self.out.resolve()),
            base=FolderSource(self.files, self.names, model_id=self.base_id).describe(),
            method={
                "name": "merge",
                "keep_qk": self.qk_share == 1,
                "alpha": 1 - self.qk_share,
                **self.chosen.to_json(),
            },
            results=results,
            companions=taken,
            left_out=left,
            partial=[],
            warnings=list(self._warnings()),
            extra={"adapter": about, **extra},
        )

    def _warnings(self) -> Iterator[str]:
        named = self.adapter.base
        same = named and (identify(named, Path(named))["id"] == identify(self.base_id, self.raw)["id"])
        if named and not same:
            yield f"the adapter names {named} as its base; it was merged onto {self.base_id}"
        if self.added:
            yield (
                f"{', '.join(self.added)} was trained or kept apart from what it had been tied to: the merged model's "
                "embeddings are no longer tied"
            )
        if self.qk_share < 1 and not any(c in self.qk for c in self.changes):
            yield "the adapter does not touch queries and keys: leaving them out changes nothing"


def _whole(change: Change) -> ParamMap:
    shape = change.shape
    return ParamMap(change.name, shape, 0, "weight" if len(shape) > 1 else "bias", (Block(0, shape[0], "v"),))
