"""Is a checkpoint whole: does `from_pretrained` find a tensor for every parameter?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from qkguard.checkpoint.weights import WeightFolder
from qkguard.errors import QKGuardError
from qkguard.layout.cache import cached
from qkguard.layout.loading import Loading, ask_loading
from qkguard.layout.model_code import import_model_code, nothing
from qkguard.layout.wrappers import wrapped_names
from qkguard.offline.configs import read_config


def folder_loading(
    weights: WeightFolder, renamed: Mapping[str, str] | None = None, *, trust_remote_code: bool = False
) -> Loading | None:
    """`ask_loading` of a folder, its tensors under other names where `renamed` says so; the answer is remembered.

    Raises:
        QKGuardError: as `ask_loading`.
    """
    folder, names = weights.folder, renamed or {}
    config = read_config(folder)
    shapes = {names.get(name, name): shape for name, shape in weights.shapes().items()}

    def find() -> Loading | None:
        import_model_code()
        return ask_loading(shapes, folder, trust_remote_code=trust_remote_code)

    if trust_remote_code or "auto_map" in config:
        return find()
    answer = cached("loading", [config, shapes], find)
    return None if answer is None else Loading(*answer)


def refuse_incomplete(weights: WeightFolder, *, as_written: bool = False, trust_remote_code: bool = False) -> None:
    """Refuse a checkpoint that `from_pretrained` would fill at random; with `as_written`, under the names that
    restoring and merging write.

    What cannot be asked, for instance a class that is not part of transformers, is let through.
    """
    renamed = wrapped_names(weights.where) if as_written else {}
    try:
        loading = folder_loading(weights, renamed, trust_remote_code=trust_remote_code)
    except QKGuardError:
        return
    if loading is not None and (problem := what_fails(loading)):
        raise QKGuardError(f"{weights.folder} {problem}. Save the whole model again with save_pretrained.")


def embeddings_apart(weights: WeightFolder, before_import: Callable[[], None] = nothing) -> list[str]:
    """A sentence for each tied parameter that is stored under several names with different values.

    `before_import` is called before the model's code is imported, unless the answer is remembered.
    """
    config, shapes = read_config(weights.folder), weights.shapes()
    sizes = Counter(shape for shape in shapes.values() if shape[:1] == (config.get("vocab_size"),))
    if max(sizes.values(), default=0) < 2 or "auto_map" in config:
        return []

    def find() -> list[list[str]]:
        before_import()
        import_model_code()
        from qkguard.layout.names import tensors_of_params

        found = tensors_of_params(weights.folder, shapes).values()
        plain = [[tensor.key for tensor in tensors if not tensor.rearranged] for tensors in found]
        return [keys for keys in plain if len(keys) > 1]

    try:
        tied = cached("tied", [config, shapes], find)
    except QKGuardError:  # a class that is not part of transformers: its layout was given by hand
        return []
    return [
        f"{weights.folder} stores tied embeddings twice ({first} and {other}), and they differ: from_pretrained then "
        "leaves them untied. If they were trained apart, set tie_word_embeddings to false in its config.json; if not, "
        "delete the wrong one"
        for first, *others in tied
        for other in others
        if not weights.same_bytes(first, other)
    ]


def what_fails(loading: Loading) -> str | None:
    """What keeps a checkpoint from loading whole, as it follows the folder's name; None where nothing does."""
    if loading.missing:
        also = f" Its {loading.unused[0]} finds no parameter." if loading.unused else ""
        return (
            f"has no tensor for {len(loading.missing)} of the model's {loading.parameters} parameters, first "
            f"{loading.missing[0]}: from_pretrained would leave them random.{also}".rstrip(".")
        )
    if loading.misfits:
        return f"holds {len(loading.misfits)} tensors of another shape than the model, first {loading.misfits[0]}"
    return None
