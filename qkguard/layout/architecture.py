"""From whatever the caller holds to a model class and its config, and a copy of the class on the meta device.

No weights are read and no live model is touched.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributions import Distribution

from qkguard.errors import QKGuardError, UnknownLayoutError, first_line
from qkguard.layout.hub_id import split_revision
from qkguard.layout.rules import RULES
from qkguard.layout.spec_file import BY_HAND


class Architecture(NamedTuple):
    """A model class and its config.

    The class is None for models that are known by rule (`rules`): their code is not imported.
    """

    model_class: type[nn.Module] | None
    config: Any


class RuleConfig(SimpleNamespace):
    """The values of a config.json whose config class is not imported."""

    def get_text_config(self, **_: Any) -> RuleConfig:
        return self


def find_architecture(model_or_config: Any, *, trust_remote_code: bool = False) -> Architecture:
    """Model, config, folder, hub id or config.json path -> class and a private copy of its config.

    Raises:
        QKGuardError: no such file, or not JSON.
        UnknownLayoutError: no model class is known for the config.
    """
    if isinstance(model_or_config, nn.Module):
        model: Any = bare_model(model_or_config)
        config = getattr(model, "config", None)
        if config is None or not hasattr(type(model), "config_class"):
            raise UnknownLayoutError(
                f"{type(model).__name__} is not a transformers model: it has no config to build a copy from; {BY_HAND}"
            )
        if config.model_type in RULES:
            return Architecture(None, RuleConfig(**config.to_dict()))
        return Architecture(type(model), copy.deepcopy(config))
    config = load_config(model_or_config, trust_remote_code=trust_remote_code)
    if isinstance(config, RuleConfig):
        return Architecture(None, config)
    model_class = _model_class(config, trust_remote_code)
    return Architecture(model_class, copy.deepcopy(_own_config(model_class, config)))


def bare_model(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, torch.compile, a DeepSpeed engine and PEFT.

    `distributed.sharding.unwrap` stops at PEFT, whose adapters are part of what is trained.
    """
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

    A hub id may name a revision: `org/model@v1.0`.

    Raises:
        QKGuardError: no such file, or not JSON.
        UnknownLayoutError: a model type that is not part of transformers.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(source, PreTrainedConfig):
        return RuleConfig(**source.to_dict()) if source.model_type in RULES else source
    if not isinstance(source, str | os.PathLike):
        raise QKGuardError(
            f"Expected a model, a config, a folder, a hub id or a config.json, found {type(source).__name__}"
        )
    source, revision = split_revision(os.fspath(source))
    at = {} if revision is None else {"revision": revision}
    path = Path(source)
    if path.suffix == ".json" or path.is_dir():
        _check_json(path if path.suffix == ".json" else path / "config.json")
    try:
        values, _ = PreTrainedConfig.get_config_dict(source, **at)
        if values.get("model_type") in RULES:
            return RuleConfig(**values)
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **at)
    except Exception as error:
        if "trust_remote_code" not in str(error):
            raise UnknownLayoutError(f"No model config could be read from {source}: {first_line(error)}") from error
        raise UnknownLayoutError(
            f"{source} runs code of its own, which is not part of transformers; if you trust it, allow it with "
            f"trust_remote_code (--trust-remote-code), else {BY_HAND}"
        ) from error


def _check_json(file: Path) -> None:
    if not file.is_file():
        raise QKGuardError(f"{file} does not exist; give a folder with a config.json, or a hub id")
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QKGuardError(f"{file} is not valid JSON ({error}); save the model's config again") from None


def _model_class(config: Any, trust_remote_code: bool) -> type[nn.Module]:
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
        if named.can_generate() and type(_own_config(named, config)) is named.config_class:
            return named
    for mapping in (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise UnknownLayoutError(
        f"Model type {config.model_type!r} has no causal language model in transformers; {BY_HAND}"
    )


def _own_config(model_class: Any, config: Any) -> Any:
    """The part of a composite config (the text of a vision-language model, say) that a class is built from."""
    if isinstance(config, model_class.config_class):
        return config
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    return next((part for part in parts if isinstance(part, model_class.config_class)), config)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """PyTorch as it starts (float32, CPU, gradients, no autocast) inside, and as the caller had it afterwards.

    Kept: random states (Python, CPU and CUDA), default dtype and device, grad and inference mode, autocast, the log
    level of transformers.
    """
    from transformers.utils import logging

    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python_state, dtype, level = random.getstate(), torch.get_default_dtype(), logging.get_verbosity()
    # Distributions check their values, which tensors on meta do not have. torch has a setter for this, but no getter.
    validates = Distribution._validate_args
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


def build_meta(architecture: Architecture) -> nn.Module:
    """An eval-mode copy of the class on the meta device, built for eager attention. Call inside `plain_torch()`.

    Raises:
        UnknownLayoutError: the class cannot be built from its config here.
    """
    model_class, config = architecture
    if model_class is None:
        raise UnknownLayoutError(f"The code of {config.model_type} is not part of transformers; {BY_HAND}")
    config = copy.deepcopy(config)
    # A config that exists takes both under private names only (transformers 5.17 to 5.23).
    config._attn_implementation = "eager"
    config._experts_implementation = None  # the grouped product; "eager" loops over the experts that were chosen
    if getattr(config, "use_mamba_kernels", False):
        config.use_mamba_kernels = False  # they run on a GPU alone, and Zamba of transformers 5.6 insists on them
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = torch.float32  # read from a file it is a word, which some classes do not take
    try:
        with torch.device("meta"), _without_unsloth(model_class):
            return model_class(config).eval()
    except Exception as error:
        raise UnknownLayoutError(
            f"{model_class.__name__} cannot be built from its config: {first_line(error)}"
        ) from error


@contextlib.contextmanager
def _without_unsloth(model_class: type[nn.Module]) -> Iterator[None]:
    """The classes that a model's source file had before Unsloth put its own in their place, while the block runs.

    Those run on a GPU alone. Unsloth (2026.10.9) keeps the others in the file, under a private name. Its methods need
    no such care: they are for the models that it has loaded itself.
    """
    file = vars(sys.modules[model_class.__module__]) if model_class.__module__ in sys.modules else {}
    originals, _ = file.get("_unsloth_pre_patch_originals", ({}, {}))
    patched = {name: file[name] for name in originals if name in file}
    file.update(originals)
    try:
        yield
    finally:
        file.update(patched)
