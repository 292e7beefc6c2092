"""Files that a new folder has beside those of the raw one: a folder of one file becomes several, with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qkguard.checkpoint.weights import WeightFolder
from qkguard.checkpoint.write import FilePlan
from qkguard.errors import QKGuardError
from qkguard.layout.wrappers import wrapped_names


def with_added(
    weights: WeightFolder, files: Sequence[FilePlan], added: Sequence[FilePlan], stem: str
) -> tuple[FilePlan, ...]:
    """The plan's files with more of them, named so that `from_pretrained` and inference engines find them all.

    Args:
        weights: the raw folder.
        files: the plan of its files.
        added: plans of files that it lacks, their names still to be chosen.
        stem: a word for the names of these.

    Raises:
        QKGuardError: the raw folder's config names its one file, which an index could not stand beside.
    """
    count = len(added)
    if weights.index is None:
        (only,) = files
        if only.target != "model.safetensors":
            raise QKGuardError(
                f"{weights.folder} names its one weight file {only.target} in its config (transformers_weights), so "
                "no second one can be added. Save it under the usual name, with save_pretrained."
            )
        names = [f"model-{number:05d}-of-{count + 1:05d}.safetensors" for number in range(1, count + 2)]
        files, names = (replace(only, target=names[0]),), names[1:]
    elif count == 1:
        names = [f"model-{stem}.safetensors"]
    else:
        names = [f"model-{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    taken = {file.target for file in files}.intersection(names)
    if taken:
        raise QKGuardError(f"{weights.folder} has a file {taken.pop()} already. Rename it, in its index too.")
    return (*files, *(replace(file, target=name) for file, name in zip(added, names, strict=True)))


def index_with(weights: WeightFolder, files: Sequence[FilePlan], added: Mapping[str, tuple[str, int]]) -> str:
    """The index of such a folder; `added` are its further tensors: name -> (file, bytes)."""
    targets = {file.source: file.target for file in files}
    renamed = wrapped_names(weights.where)
    where = {renamed.get(name, name): targets[file] for name, file in weights.where.items()}
    where |= {name: file for name, (file, _) in added.items()}
    entries = [weights.entry(name) for name in weights.where]
    total = sum(entry.stop - entry.start for entry in entries) + sum(nbytes for _, nbytes in added.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"
