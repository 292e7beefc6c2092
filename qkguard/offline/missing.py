"""What the base has and the tuned checkpoint lost: mostly tensors that no class loads (multi-token prediction)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from qkguard.checkpoint.scaled import scale_names
from qkguard.checkpoint.weights import WeightFolder
from qkguard.errors import UnknownLayoutError
from qkguard.layout.cache import cached
from qkguard.layout.model_code import import_model_code, nothing
from qkguard.layout.selection import up_to_layer
from qkguard.layout.wrappers import bare_name
from qkguard.offline.configs import read_config
from qkguard.offline.pair import Folders
from qkguard.report.numbers import plural

REMADE = re.compile(r"(\.inv_freq|\.masked_bias|\.attn\.bias|\.attention\.bias)$")
"""Buffers that older checkpoints hold and every model makes anew."""
EXTRA_LAYERS = re.compile(r"mtp|nextn|next_n", re.I)
"""In the names of config fields that speak of multi-token-prediction layers."""


def lost_tensors(
    folders: Folders, *, trust_remote_code: bool = False, before_import: Callable[[], None] = nothing
) -> list[str]:
    """Names in the base's files of the tensors that have no counterpart in the tuned checkpoint, in the files' order.

    Not among them: what the tuned checkpoint has under another name (as its class loads both), scales of quantised
    tensors, buffers that are made anew, and, where the tuned model is of another class (the language model of a
    vision-language base), the weights that the base's class alone has. Where names differ, `before_import` is called
    before the model's code is imported, unless the answer is remembered.
    """
    base, tuned = folders.base, folders.tuned
    there, storage = {bare_name(key) for key in tuned.where}, scale_names(base)
    unknown = [
        key for key in base.where if bare_name(key) not in there and key not in storage and not _remade(base, key)
    ]
    if not unknown:
        return []
    configs = [read_config(folder.folder) for folder in (base, tuned)]

    def find() -> list[str]:
        before_import()
        import_model_code()
        try:
            return _without_counterpart(unknown, folders, trust_remote_code)
        except UnknownLayoutError:  # a class that is not part of transformers: names are all there is to go by
            return unknown

    if trust_remote_code or any("auto_map" in config for config in configs):
        return find()
    return cached("lost", [*configs, sorted(unknown), sorted(tuned.where)], find)


def _remade(base: WeightFolder, key: str) -> bool:
    """`.bias` of an attention is a causal mask where it has more than one dimension."""
    return bool(REMADE.search(key)) and (not key.endswith(".bias") or len(base.entry(key).shape) > 1)


def _without_counterpart(keys: Sequence[str], folders: Folders, trust_remote_code: bool) -> list[str]:
    from qkguard.layout.architecture import find_architecture
    from qkguard.layout.names import loaded_names

    def names(model: Any, asked: Sequence[str]) -> dict[str, list[str]]:
        return loaded_names(model, asked, trust_remote_code=trust_remote_code)

    tuned = folders.tuned
    held = {name for found in names(tuned.folder, list(tuned.where)).values() for name in found}
    lost = [key for key, found in names(tuned.folder, keys).items() if not held.issuperset(found) or not found]
    how = {"trust_remote_code": trust_remote_code}
    classes = [find_architecture(folder.folder, **how).model_class for folder in (folders.base, tuned)]
    if lost and classes[0] is not classes[1]:
        own = names(folders.base.folder, lost)
        lost = [key for key in lost if not own[key]]
    return lost


def describe_lost(lost: Sequence[str], folders: Folders, *, carried: bool) -> list[str]:
    """What to say of them: what they are and how to bring them along, and config fields that went with them."""
    if not lost:
        return []
    lines = []
    if not carried:
        lines.append(
            f"the tuned checkpoint lacks {plural(len(lost), 'tensor')} that the base has ({_grouped(lost)}), left out "
            "here. Copy from the base with --carry-missing (carry_missing=True)"
        )
    base, tuned = (read_config(folder.folder) for folder in (folders.base, folders.tuned))
    for key, value in base.items():
        if EXTRA_LAYERS.search(key) and value and not tuned.get(key):
            lines.append(
                f"{key} is {value} in the base's config, and the tuned one dropped it: inference engines read it to "
                "use such layers. Set it in the restored folder's config.json if you carry them over"
            )
    return lines


def _grouped(names: Sequence[str]) -> str:
    """Names by what they begin with, up to the number of a layer: "mtp: 12, model.layers.61: 8"."""
    counts = Counter(_beginning(name) for name in names)
    shown = [f"{name}: {count}" if count > 1 else name for name, count in counts.most_common(4)]
    return ", ".join(shown) + (", ..." if len(counts) > 4 else "")


def _beginning(name: str) -> str:
    return "mtp" if name.split(".")[0] == "mtp" else up_to_layer(name) or name
