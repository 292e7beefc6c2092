"""Which tensor of a checkpoint file a parameter is loaded from: transformers' own renaming, asked, never guessed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qkguard.errors import QKGuardError, RearrangedError
from qkguard.layout import build
from qkguard.layout.spec import AttentionSpec, ParamMap


def disk_names(
    specs_or_params: Iterable[AttentionSpec | ParamMap],
    keys: Mapping[str, tuple[int, ...]],
    config: Any,
    *,
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """Parameter name -> name of the tensor in the checkpoint files that holds exactly this parameter.

    Args:
        specs_or_params: what to look up.
        keys: names and shapes of all tensors in the files.
        config: the model's config, or whatever else `find_attention` accepts (a live model settles its class).
        trust_remote_code: allow a config's own code to be imported.

    Raises:
        RearrangedError: where transformers cuts or joins a parameter's tensors while loading. Such a checkpoint has
            to go through `from_pretrained` and `save_pretrained`.
        QKGuardError: where a parameter has no tensor, or one of another shape.
    """
    wanted = {
        p.name: p for item in specs_or_params for p in (item.params if isinstance(item, AttentionSpec) else (item,))
    }
    source = build.resolve(config, trust_remote_code=trust_remote_code)
    if source.model_class is None:  # known by rule, under the names on disk
        loads = {build.bare_name(key): [(key, False)] for key in keys}
    else:
        with build.undisturbed():
            loads = _loaded_from(build.build_meta(source), keys)
    return {name: _certain(param, build.bare_name(name), loads, keys) for name, param in wanted.items()}


def _loaded_from(model: Any, keys: Iterable[str]) -> dict[str, list[tuple[str, bool]]]:
    """Parameter -> [(file key, whether it is rearranged)], by transformers' own steps; tied names together."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    first: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(param), name)
    names = {name: first[id(param)] for name, param in model.named_parameters(remove_duplicate=False)}
    loads: dict[str, list[tuple[str, bool]]] = {}
    for key in keys:
        bare = build.bare_name(key)
        target, rearranged = rename_source_key(bare, renamings, converters, prefix, state)
        if target not in state and bare in state:
            target, rearranged = rename_source_key(bare, [], [], prefix, state)
        if target in names:
            loads.setdefault(names[target], []).append((key, rearranged is not None))
    return loads


def _certain(
    param: ParamMap, bare: str, loads: dict[str, list[tuple[str, bool]]], keys: Mapping[str, tuple[int, ...]]
) -> str:
    found = loads.get(bare, [])
    way_out = "restore it on a model loaded with from_pretrained, and save that"
    if not found:
        if beside := cut_beside(bare, loads):
            raise RearrangedError(
                f"{param.name} has no tensor of its own on disk; transformers cuts it out of {beside[0]} while "
                f"loading; {way_out}"
            )
        raise QKGuardError(
            f"none of the checkpoint's {len(keys)} tensors loads as {bare}; is this checkpoint of the same model?"
        )
    if len(found) > 1:
        raise RearrangedError(
            f"{param.name} is loaded from several tensors ({', '.join(key for key, _ in found)}); {way_out}"
        )
    key, rearranged = found[0]
    if rearranged:
        raise RearrangedError(f"{param.name}: transformers rearranges {key} while loading it; {way_out}")
    if tuple(keys[key]) != param.shape:
        raise QKGuardError(
            f"{key}: the file has shape {tuple(keys[key])}, the model {param.shape}; the checkpoint is another model's"
        )
    return key


def cut_beside(bare: str, loads: Mapping[str, list[tuple[str, bool]]]) -> list[str]:
    """Keys that transformers rearranges into parameters of the same block as `bare`."""
    block = bare.rpartition(".")[0].rpartition(".")[0]
    return sorted({key for name, sources in loads.items() if name.startswith(block) for key, cut in sources if cut})


def rearranged_sources(
    params: Iterable[ParamMap], keys: Iterable[str], config: Any, *, trust_remote_code: bool = False
) -> dict[str, list[str]]:
    """Parameter name -> all keys whose tensors may hold its rows, for a checkpoint that `disk_names` refuses."""
    source = build.resolve(config, trust_remote_code=trust_remote_code)
    with build.undisturbed():
        loads = _loaded_from(build.build_meta(source), keys)
    out = {}
    for name in (param.name for param in params):
        bare = build.bare_name(name)
        out[name] = sorted({*(key for key, _ in loads.get(bare, ())), *cut_beside(bare, loads)})
    return out
