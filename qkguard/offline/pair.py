"""A base and a tuned checkpoint side by side: are they a pair, and which rows of which tensors belong together?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkguard.checkpoint.scaled import describe_quantisation, refusal
from qkguard.checkpoint.weights import BaseFolder, WeightFolder, open_weights, resolve_folder
from qkguard.errors import QKGuardError, RearrangedError
from qkguard.layout.cache import cached
from qkguard.layout.model_code import import_model_code, nothing
from qkguard.layout.rows import RowSelection
from qkguard.layout.selection import Selection, select, unselected_norms
from qkguard.layout.spec import AttentionSpec, ParamMap, specs_from_json, specs_to_json
from qkguard.offline.configs import compare_configs, read_config
from qkguard.offline.whole import embeddings_apart


@dataclass(frozen=True)
class Pair:
    """What to restore in a tuned checkpoint, and from where."""

    weights: WeightFolder
    specs: list[AttentionSpec]
    selection: Selection
    names: Mapping[str, str]
    base: BaseFolder
    warnings: list[str]


@dataclass(frozen=True)
class Folders:
    """Two checkpoints, headers read, configs compared (`warnings`); no model's code was imported for it."""

    base: WeightFolder
    tuned: WeightFolder
    base_id: str
    warnings: list[str]


def open_folders(base: str | os.PathLike[str], tuned: str | os.PathLike[str]) -> Folders:
    """Open a base and a tuned checkpoint; folders, or hub ids.

    Raises:
        QKGuardError: one is missing or broken, or they are of different architectures (`compare_configs`).
    """
    base_folder = resolve_folder(base)
    folder = resolve_folder(tuned)
    if base_folder.resolve() == folder.resolve():
        raise QKGuardError(f"Base and tuned are the same folder ({folder}). Give the checkpoint before SFT as base.")
    weights = open_weights(folder)
    base_weights = open_weights(base_folder)
    warnings = compare_configs(read_config(base_folder), read_config(folder))
    return Folders(base_weights, weights, os.fspath(base), warnings)


def find_pair(
    folders: Folders,
    *,
    rows: RowSelection | None = None,
    spec: Any = None,
    trust_remote_code: bool = False,
    gains: bool = False,
    before_import: Callable[[], None] = nothing,
) -> Pair:
    """Find the queries and keys of the tuned checkpoint and where the base keeps the same rows.

    With `gains` the names include those of the q/k norms in the tuned checkpoint that are not selected.
    `before_import` is called before the model's code is imported, which takes seconds and is not needed for a config
    that was seen before.

    Raises:
        QKGuardError: whatever `find_attention`, `select` and `disk_names` refuse, or a base without those rows.
    """
    base_weights, weights = folders.base, folders.tuned
    specs = folder_attention(
        weights.folder, spec=spec, trust_remote_code=trust_remote_code, before_import=before_import
    )
    selection = select(specs, rows)
    params = [param for _, maps in selection for param in maps]
    # Both through the tuned model's class, as when SFT loaded the base: its own class may differ (text-only or not).
    how: dict[str, Any] = {"by_hand": spec is not None, "trust_remote_code": trust_remote_code}
    how["before_import"] = before_import
    names = tensor_names(params, weights, weights.folder, **how)
    if base_weights.shapes() == weights.shapes():
        base_names = names
    else:
        base_names = _base_names(params, base_weights, weights.folder, **how)
    base = BaseFolder(base_weights, base_names, folders.base_id)
    base.check(params)
    norms = unselected_norms(selection) if gains else []
    if norms:
        names = names | tensor_names(norms, weights, weights.folder, **how)
    return Pair(weights, specs, selection, names, base, pair_warnings(folders, before_import))


def pair_warnings(folders: Folders, before_import: Callable[[], None] = nothing) -> list[str]:
    """What users are told of two checkpoints: configs that differ, tied embeddings that are stored apart."""
    apart = [line for side in (folders.base, folders.tuned) for line in embeddings_apart(side, before_import)]
    return [*folders.warnings, *apart]


def _base_names(params: Sequence[ParamMap], base: WeightFolder, model: Path, **how: Any) -> dict[str, str]:
    """`tensor_names` of a base; where it is packed into tensors of other names or shapes, that is what is said."""
    try:
        return tensor_names(params, base, model, **how)
    except RearrangedError:
        raise
    except QKGuardError:
        if describe_quantisation(base.folder) is None:
            raise
        what = f"its tensors do not hold {params[0].name} in its own shape, one value per weight"
        raise refusal(base.folder, what) from None


def known_pair(folders: Folders, **how: Any) -> Pair | None:
    """`find_pair` as far as it needs no import: None where the layout of this config is not known yet.

    Raises:
        QKGuardError: as `find_pair`, for a config that was seen before.
    """
    try:
        return find_pair(folders, before_import=_not_now, **how)
    except _NotKnownError:
        return None


class _NotKnownError(Exception):
    """An answer that only the model's code can give."""


def _not_now() -> None:
    raise _NotKnownError


def folder_attention(
    folder: Path,
    *,
    spec: Any = None,
    trust_remote_code: bool = False,
    before_import: Callable[[], None] = nothing,
) -> list[AttentionSpec]:
    """`find_attention` of a folder; what is settled by its config alone is remembered (`layout.cache`)."""
    config = read_config(folder)

    def find() -> list[AttentionSpec]:
        before_import()
        import_model_code()
        from qkguard.layout import find_attention

        return find_attention(folder, spec=spec, trust_remote_code=trust_remote_code)

    def find_json() -> list[dict[str, Any]]:
        return specs_to_json(find())

    if spec is not None or trust_remote_code or "auto_map" in config:
        return find()
    return specs_from_json(cached("attention", config, find_json))


def tensor_names(
    params: Sequence[ParamMap],
    weights: WeightFolder,
    model: Path,
    *,
    by_hand: bool = False,
    trust_remote_code: bool = False,
    before_import: Callable[[], None] = nothing,
) -> dict[str, str]:
    """Parameter name -> name in the files, as the class of `model` (a folder with a config) loads them.

    Names of a layout given by hand are taken as they are where the files have them.
    """
    shapes = weights.shapes()
    if by_hand and all(shapes.get(param.name) == param.shape for param in params):
        return {param.name: param.name for param in params}
    config = read_config(model)

    def find() -> dict[str, str]:
        before_import()
        import_model_code()
        from qkguard.layout import disk_names

        return disk_names(params, shapes, model, trust_remote_code=trust_remote_code)

    if trust_remote_code or "auto_map" in config:
        return find()
    return cached("names", [config, shapes, [(param.name, param.shape) for param in params]], find)
