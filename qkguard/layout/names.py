"""A parameter's three names: in a bare copy of its class, in a wrapped live model, and in the checkpoint's files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from qkguard.errors import QKGuardError, RearrangedError, UnknownLayoutError
from qkguard.layout.architecture import Architecture, bare_model, build_meta, find_architecture, plain_torch
from qkguard.layout.conversions import Conversions
from qkguard.layout.spec import AttentionSpec, ParamMap
from qkguard.layout.spec_file import BY_HAND
from qkguard.layout.wrappers import bare_name

WAY_OUT = "restore it on a model loaded with from_pretrained, and save that"


class DiskTensor(NamedTuple):
    """A tensor on disk that a parameter is loaded from, and whether transformers rearranges it on the way."""

    key: str
    rearranged: bool


def live_names(model: nn.Module) -> dict[str, str]:
    """Name as a bare copy of the class has it -> name in `model.named_parameters()`.

    Under PEFT the base layers count, or the trained copies in `modules_to_save`.
    """
    by_id = {id(param): name for name, param in model.named_parameters()}
    names = {}
    for name, param in bare_model(model).named_parameters():
        parts = name.split(".")
        if "original_module" in parts:  # PEFT trains a copy of it
            continue
        if "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            del parts[at : at + 2]  # with the adapter's name
        names[bare_name(".".join(parts))] = by_id.get(id(param), name)
    return names


def with_live_names(specs: Iterable[AttentionSpec], live: nn.Module) -> list[AttentionSpec]:
    """The same layout under the live model's parameter names.

    Raises:
        UnknownLayoutError: a parameter is missing, or has another shape.
    """
    params = dict(live.named_parameters())
    names = {name: name for name in params} | live_names(live)
    out = []
    for spec in specs:
        maps = []
        for param in spec.params:
            if param.name not in names:
                raise UnknownLayoutError(
                    f"The layout names {param.name}, which the model does not have (a {_class_name(live)}); where a "
                    "wrapper hides or renames its parameters, unwrap it; where the model's structure was changed "
                    f"after it was built, {BY_HAND}"
                )
            shape = _unsharded_shape(params[names[param.name]])
            if shape != param.shape:
                owner = live.get_submodule(names[param.name].rpartition(".")[0])
                raise UnknownLayoutError(
                    f"{param.name}: the layout says shape {param.shape}, the model has {shape} in a "
                    f"{_class_name(owner)}; either that module cuts or packs its weight, which qkguard does not "
                    "support, or the model's config (or the spec file) belongs to another model"
                )
            maps.append(replace(param, name=names[param.name]))
        out.append(replace(spec, params=tuple(maps)))
    return out


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _unsharded_shape(param: Tensor) -> tuple[int, ...]:
    """ZeRO-3 keeps the whole shape in `ds_shape`, bitsandbytes' 4-bit packing in `quant_state`; a DTensor has it."""
    if hasattr(param, "ds_shape"):
        return tuple(param.ds_shape)
    packed = getattr(param, "quant_state", None)
    return tuple(getattr(packed, "shape", param.shape))


def disk_names(
    specs_or_params: Iterable[AttentionSpec | ParamMap],
    keys: Mapping[str, tuple[int, ...]],
    config: Any,
    *,
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """Parameter name -> name of the tensor in the checkpoint files that holds exactly this parameter.

    Which tensor a parameter is loaded from is asked of transformers' own loading code, never guessed.

    Args:
        specs_or_params: what to look up.
        keys: names and shapes of all tensors in the files.
        config: the model's config, or whatever else `find_attention` accepts (a live model settles its class).
        trust_remote_code: allow a config's own code to be imported.

    Raises:
        RearrangedError: transformers cuts or joins a parameter's tensors while loading. Such a checkpoint has to go
            through `from_pretrained` and `save_pretrained`.
        QKGuardError: a parameter has no tensor, or one of another shape.
    """
    wanted: dict[str, ParamMap] = {}
    for item in specs_or_params:
        params = item.params if isinstance(item, AttentionSpec) else (item,)
        wanted.update({param.name: param for param in params})
    loaded = tensors_of_params(config, keys, trust_remote_code=trust_remote_code)
    return single_tensors(wanted.values(), loaded, keys)


def single_tensors(
    params: Iterable[ParamMap], loaded: Mapping[str, Sequence[DiskTensor]], keys: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Parameter name -> the one tensor that holds it, in what `tensors_of_params` found; raises as `disk_names`."""
    return {param.name: _single_tensor(param, loaded, keys) for param in params}


def tensors_of_params(
    config: Any, keys: Iterable[str], *, trust_remote_code: bool = False
) -> dict[str, list[DiskTensor]]:
    """Bare parameter name -> the tensors on disk that transformers loads it from; a tied one under its first name.

    `config` is as for `disk_names`. Parameters without a tensor are left out.

    Raises:
        QKGuardError: the model's class cannot be built.
    """
    architecture = find_architecture(config, trust_remote_code=trust_remote_code)
    if architecture.model_class is None:  # known by rule, under the names on disk
        return {bare_name(key): [DiskTensor(key, False)] for key in keys}
    return _disk_tensors(architecture, keys)


def loaded_names(config: Any, keys: Iterable[str], *, trust_remote_code: bool = False) -> dict[str, list[str]]:
    """Key on disk -> the model's tensors that are loaded from it (tied ones under their first name), buffers too.

    `config` is as for `disk_names`.

    Raises:
        QKGuardError: the model's class cannot be built, or its code is not imported.
    """
    architecture = find_architecture(config, trust_remote_code=trust_remote_code)
    with plain_torch():
        model: Any = build_meta(architecture)
    conversions = Conversions(model)
    by_id: dict[int, str] = {}
    first = {name: by_id.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}
    return {key: [first[name] for name in conversions.targets(key)] for key in keys}


def rearranged_sources(
    params: Iterable[ParamMap], keys: Iterable[str], config: Any, *, trust_remote_code: bool = False
) -> dict[str, list[str]]:
    """Parameter name -> all keys whose tensors may hold its rows, for a checkpoint that `disk_names` refuses."""
    loaded = _disk_tensors(find_architecture(config, trust_remote_code=trust_remote_code), keys)
    out = {}
    for param in params:
        name = bare_name(param.name)
        own = {tensor.key for tensor in loaded.get(name, ())}
        out[param.name] = sorted(own.union(_cut_in_block(name, loaded)))
    return out


def _disk_tensors(architecture: Architecture, keys: Iterable[str]) -> dict[str, list[DiskTensor]]:
    """Bare parameter name -> the tensors it is loaded from, by transformers' own steps; tied names together."""
    with plain_torch():
        model: Any = build_meta(architecture)
    conversions = Conversions(model)
    first: dict[int, str] = {}  # a tied parameter goes by the first of its names
    names: dict[str, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(param), name)
    loaded: dict[str, list[DiskTensor]] = {}
    for key in keys:
        target, pattern = conversions.target(key)
        if target in names:
            loaded.setdefault(names[target], []).append(DiskTensor(key, pattern is not None))
    return loaded


def _single_tensor(
    param: ParamMap, loaded: Mapping[str, Sequence[DiskTensor]], keys: Mapping[str, tuple[int, ...]]
) -> str:
    """The one tensor that is loaded as this parameter, as it is."""
    name = bare_name(param.name)
    found = loaded.get(name, [])
    if not found:
        cut = _cut_in_block(name, loaded)
        if cut:
            raise RearrangedError(
                f"{param.name} has no tensor of its own on disk; transformers cuts it out of {cut[0]} while loading; "
                f"{WAY_OUT}"
            )
        raise QKGuardError(
            f"None of the checkpoint's {len(keys)} tensors loads as {name}; is this checkpoint of the same model?"
        )
    if len(found) > 1:
        several = ", ".join(tensor.key for tensor in found)
        raise RearrangedError(f"{param.name} is loaded from several tensors ({several}); {WAY_OUT}")
    key, rearranged = found[0]
    if rearranged:
        raise RearrangedError(f"{param.name}: transformers rearranges {key} while loading it; {WAY_OUT}")
    if tuple(keys[key]) != param.shape:
        shape = tuple(keys[key])
        raise QKGuardError(
            f"{key}: the file has shape {shape}, the model {param.shape}; the checkpoint belongs to another model"
        )
    return key


def _cut_in_block(name: str, loaded: Mapping[str, Sequence[DiskTensor]]) -> list[str]:
    """Keys that transformers rearranges into parameters of the same block as parameter `name`."""
    block = name.rpartition(".")[0].rpartition(".")[0]
    cut: set[str] = set()
    for other, found in loaded.items():
        if other.startswith(block):
            cut.update(tensor.key for tensor in found if tensor.rearranged)
    return sorted(cut)
