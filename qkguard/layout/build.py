"""From whatever the caller holds to a copy of its class on the meta device: no weights, no live model touched."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

from qkguard.errors import QKGuardError, UnknownLayoutError
from qkguard.layout.static import RULES

BY_HAND = "describe its layout by hand (spec=FILE.yaml, --spec FILE.yaml)"
# Wrappers that add a level to parameter names and change nothing: torch.compile, activation checkpointing, FSDP1.
TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class Source:
    """What there is to look at: a model class with its config, and the live model where one was given.

    No class stands for a model that is known by rule (`static`) and whose code is not imported.
    """

    model_class: type[nn.Module] | None
    config: Any
    live: nn.Module | None = None


class RuleConfig(SimpleNamespace):
    """The values of a config.json whose config class is not imported."""

    def get_text_config(self, **_: Any) -> RuleConfig:
        return self


def resolve(model_or_config: Any, *, trust_remote_code: bool = False) -> Source:
    """Model, config, folder, hub id or config.json path -> class, a private copy of its config, the live model if any.

    Raises UnknownLayoutError where no model class is known for the config.
    """
    if isinstance(model_or_config, nn.Module):
        model: Any = unwrap(model_or_config)
        config = getattr(model, "config", None)
        if config is None or not hasattr(type(model), "config_class"):
            raise UnknownLayoutError(
                f"{type(model).__name__} is no transformers model (no config to build a second copy from); {BY_HAND}"
            )
        if config.model_type in RULES:
            return Source(None, RuleConfig(**config.to_dict()), model_or_config)
        return Source(type(model), copy.deepcopy(config), model_or_config)
    config = load_config(model_or_config, trust_remote_code=trust_remote_code)
    if isinstance(config, RuleConfig):
        return Source(None, config)
    model_class = model_class_of(config, trust_remote_code=trust_remote_code)
    return Source(model_class, copy.deepcopy(own_config(model_class, config)))


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, torch.compile, a DeepSpeed engine or PEFT."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module) and not hasattr(inner, "config_class"):
            inner = inner.module
        else:
            return inner


def load_config(source: Any, *, trust_remote_code: bool = False) -> Any:
    """A config object from itself, a config.json, a folder or a hub id; a RuleConfig for the models known by rule.

    Raises:
        QKGuardError: no such file, or not JSON.
        UnknownLayoutError: a model type that is not part of transformers.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(source, PreTrainedConfig):
        return RuleConfig(**source.to_dict()) if source.model_type in RULES else source
    if not isinstance(source, str | os.PathLike):
        raise QKGuardError(
            f"expected a model, a config, a folder, a hub id or a config.json, found {type(source).__name__}"
        )
    path = Path(source)
    if path.suffix == ".json" or path.is_dir():
        _check_json(path if path.suffix == ".json" else path / "config.json")
    try:
        values, _ = PreTrainedConfig.get_config_dict(str(source))
        if values.get("model_type") in RULES:
            return RuleConfig(**values)
        return AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UnknownLayoutError(_unknown_config(source, error)) from error


def _check_json(file: Path) -> None:
    if not file.is_file():
        raise QKGuardError(f"{file} does not exist; give a folder with a config.json, or a hub id")
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QKGuardError(f"{file} is not valid JSON ({error}); save the model's config again") from None


def _unknown_config(source: Any, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"{source} runs code of its own, which is not part of transformers; if you trust it, allow it with "
            f"trust_remote_code (--trust-remote-code), else {BY_HAND}"
        )
    return f"no model config could be read from {source}: {first_line(error)}"


def model_class_of(config: Any, *, trust_remote_code: bool = False) -> type[nn.Module]:
    """The class a checkpoint with this config is trained as: what `architectures` names, else its causal LM."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto import modeling_auto as auto

    remote = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if remote and trust_remote_code and not type(config).__module__.startswith("transformers.models."):
        return get_class_from_dynamic_module(remote, config.name_or_path)
    for name in getattr(config, "architectures", None) or []:
        named = getattr(transformers, name, None)
        if not isinstance(named, type) or not issubclass(named, transformers.PreTrainedModel):
            continue
        if named.can_generate() and type(own_config(named, config)) is named.config_class:
            return named
    for mapping in (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise UnknownLayoutError(
        f"model type {config.model_type!r} has no causal language model in transformers; {BY_HAND}"
    )


def own_config(model_class: Any, config: Any) -> Any:
    """The part of a composite config (the text of a vision-language model, say) that a class is built from."""
    if not isinstance(config, model_class.config_class):
        for name in getattr(config, "sub_configs", None) or {}:
            if isinstance(part := getattr(config, name, None), model_class.config_class):
                return part
    return config


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A plain PyTorch inside (float32, on the CPU, gradients, no autocast), and everything as it was afterwards.

    Random states (Python, CPU and CUDA), default dtype and device, grad and inference mode, autocast, log level.
    """
    from transformers.utils import logging

    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python_state, dtype, level = random.getstate(), torch.get_default_dtype(), logging.get_verbosity()
    validates = Distribution._validate_args  # a check of values, which a weightless copy does not have
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))
        try:
            torch.set_default_dtype(torch.float32)
            logging.set_verbosity_error()
            Distribution.set_default_validate_args(False)
            yield
        finally:
            random.setstate(python_state)
            torch.set_default_dtype(dtype)
            logging.set_verbosity(level)
            Distribution.set_default_validate_args(validates)


def build_meta(source: Source) -> nn.Module:
    """An eval-mode copy of the class on the meta device, built for eager attention. Call inside `undisturbed()`.

    Raises UnknownLayoutError where the class cannot be built from its config here.
    """
    if source.model_class is None:
        raise UnknownLayoutError(f"the code of {source.config.model_type} is not part of transformers; {BY_HAND}")
    config = copy.deepcopy(source.config)
    config._attn_implementation = "eager"
    config._experts_implementation = None  # a chosen "eager" loops over the experts hit
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = torch.float32  # read from a file it is a word, which some classes do not take
    try:
        with torch.device("meta"):
            return source.model_class(config).eval()
    except Exception as error:
        raise UnknownLayoutError(
            f"{source.model_class.__name__} cannot be built from its config: {first_line(error)}"
        ) from error


def bare_name(name: str) -> str:
    """A parameter's name without what wrappers put in: torch.compile, DDP, checkpointing, FSDP1, PEFT."""
    name = ".".join(part for part in name.split(".") if part not in TRANSPARENT and part != "base_layer")
    return name.removeprefix("module.").removeprefix("base_model.model.")


def live_names(model: nn.Module) -> dict[str, str]:
    """Name as a bare copy of the class has it -> name in `model.named_parameters()`.

    Strips what wrappers put in between: torch.compile, DDP, activation checkpointing, PEFT's `base_model.model.` and
    `base_layer`. Under PEFT the base layers count, or the trained copies in `modules_to_save`.
    """
    by_id = {id(p): name for name, p in model.named_parameters()}
    names = {}
    for name, param in unwrap(model).named_parameters():
        parts = name.split(".")
        if "original_module" in parts:  # PEFT trains a copy of it
            continue
        if "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            del parts[at : at + 2]
        names[bare_name(".".join(parts))] = by_id.get(id(param), name)
    return names


def full_shape(param: torch.Tensor) -> tuple[int, ...]:
    """The unsharded shape: ZeRO-3 keeps it in `ds_shape`, 4-bit packing in `quant_state`; a DTensor has it."""
    return tuple(getattr(param, "ds_shape", getattr(getattr(param, "quant_state", None), "shape", param.shape)))


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
