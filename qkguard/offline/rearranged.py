"""Checkpoints whose tensors transformers cuts or joins while loading: which rows on disk restoring changes.

The only way that is certain goes through transformers itself: load both models, put the base's queries and keys into
the tuned one, save that, and see which rows of which tensors came out different. It needs the memory of both models
and the disk of one, unlike everything else here; of transformers 5.23's causal LMs, HRM-Text alone needs it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qkguard.arrays import cast
from qkguard.checkpoint.weights import BaseFolder, WeightFolder, open_weights
from qkguard.errors import QKGuardError
from qkguard.layout.selection import Selection
from qkguard.layout.spec import AttentionSpec, Block, ParamMap, true_ranges
from qkguard.offline.models import load_whole


def selection_on_disk(
    base: WeightFolder,
    tuned: WeightFolder,
    selection: Selection,
    work: Path,
    *,
    base_id: str,
    trust_remote_code: bool = False,
) -> tuple[Selection, BaseFolder]:
    """The selection in terms of the tensors on disk, and the rows to write there.

    Args:
        selection: layers and parameters by their names in memory.
        work: an empty folder for one copy of the model.

    Returns:
        The layers with maps of disk tensors (rows that feed queries, keys or both have the role "qk"), and the source
        that holds them restored.

    Raises:
        QKGuardError: a model that does not load, or that transformers saves under other names than it was loaded from.
    """
    from qkguard.layout.names import rearranged_sources

    mixed = _load(tuned.folder, tuned.folder, trust_remote_code)
    donor = _load(base.folder, tuned.folder, trust_remote_code)
    theirs = dict(donor.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, param in mixed.named_parameters(remove_duplicate=False):
            for pmap in (p for _, maps in selection for p in maps if p.name == name):
                pmap.put(param, pmap.take(theirs[name]))
    mixed.save_pretrained(work)
    del mixed, donor, theirs
    saved = open_weights(work)
    every = [pmap for _, maps in selection for pmap in maps]
    keys = rearranged_sources(every, tuned.shapes(), tuned.folder, trust_remote_code=trust_remote_code)
    out: list[tuple[AttentionSpec, tuple[ParamMap, ...]]] = []
    taken: set[str] = set()
    for spec, maps in selection:
        fresh = sorted({key for pmap in maps for key in keys[pmap.name]} - taken)
        taken.update(fresh)
        params = tuple(p for p in (_changed(key, tuned, saved) for key in fresh) if p)
        if params:
            out.append((spec, params))
    if not out:
        raise QKGuardError("The base and the tuned model have the same queries and keys: there is nothing to restore.")
    names = {p.name: p.name for _, params in out for p in params}
    return out, BaseFolder(saved, names, model_id=base_id)


def _load(folder: Path, like: Path, trust_remote_code: bool) -> Any:
    """A model in its file's dtype, through the class of the tuned one."""
    from qkguard.layout.architecture import find_architecture

    architecture = find_architecture(like, trust_remote_code=trust_remote_code)
    return load_whole(architecture.model_class, folder, dtype="auto", trust_remote_code=trust_remote_code)


def _changed(key: str, tuned: WeightFolder, saved: WeightFolder) -> ParamMap | None:
    """The rows (slices along the first dimension) of a disk tensor that came out different; None for none."""
    shape = tuned.shapes()[key]
    if saved.shapes().get(key) != shape:
        raise QKGuardError(
            f"{key} of {tuned.folder} is loaded by transformers, but not saved again in the shape {list(shape)}. Save "
            "the tuned model with this version of transformers first."
        )
    whole = ParamMap(key, shape, 0, "weight", (Block(0, shape[0], "qk"),))
    before, after = tuned.read(key, whole), saved.read(key, whole)
    moved = (before != cast(after, before.dtype)).reshape(shape[0], -1).any(1)
    blocks = tuple(Block(start, stop, "qk") for start, stop in true_ranges(moved))
    kind = "bias" if len(shape) == 1 else "weight"
    return replace(whole, kind=kind, blocks=blocks) if blocks else None
