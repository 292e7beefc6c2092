"""Tiny models of every causal-LM type, and what their attentions compute, measured without the package's own code."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoConfig, AutoModelForCausalLM, Cache

CONFIGS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "tiny_configs.json").read_text())
_TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
_BYTES = _TEXT | {"num_key_value_heads": 4, "num_hidden_layers": 2}
_SLIDING = {
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "head_dim": 24,
    "qk_nope_head_dim": 16,
    "v_head_dim": 20,
    "qk_rope_head_dim": 8,
}
# Sizes that the overrides leave at their published values, made small for speed.
SMALLER: dict[str, dict[str, Any]] = {
    "blt": {"encoder_config": _BYTES, "decoder_config": _BYTES},
    "dots3_note": {"text_config": {"per_layer_config": {"2": _SLIDING, "3": _SLIDING}}},
    "dots3_note_text": {"per_layer_config": {"2": _SLIDING, "3": _SLIDING}},
    "got_ocr2": {"text_config": _TEXT | {"num_hidden_layers": 4, "vocab_size": 256}},
    "moss_transcribe_diarize": {"text_config": _TEXT | {"num_hidden_layers": 4, "vocab_size": 256, "head_dim": 16}},
}
ORACLE = "oracle"  # name of the attention function that watches
TOKENS = 6

Arguments = tuple[tuple, dict]
Seen = tuple[Tensor, Tensor, Tensor]  # q, k, v


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The config class of a type with overrides that make it tiny; a type that this transformers lacks is skipped."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    values = CONFIGS[model_type]["overrides"] | overrides
    for part, smaller in SMALLER.get(model_type, {}).items():
        values = values | {part: values.get(part, {}) | smaller}
    return AutoConfig.for_model(model_type, **values)


def tiny_model(model_type: str, implementation: str = "eager", **overrides: Any) -> nn.Module:
    """A tiny random float32 model in which vectors (biases, gains) are random too, so that none of them hides."""
    config = tiny_config(model_type, **overrides)
    if getattr(config, "use_mamba_kernels", False):
        config.use_mamba_kernels = False  # they run on a GPU alone
    torch.manual_seed(0)
    with attention(lambda *_, **__: None) if implementation == ORACLE else contextlib.nullcontext():
        if model_type.startswith("musicgen"):  # AutoModelForCausalLM hands the decoder the whole config
            model_class = getattr(transformers, CONFIGS[model_type]["class"])
            model = model_class._from_config(config.decoder, attn_implementation=implementation).eval()
        else:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * (0.1 if param.dim() > 1 else 0.3))
    return model


def inputs_for(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Forms of text input, one of which every model accepts: no mask, 4-D mask, 2-D mask, several codebooks."""
    windows = getattr(model.config, "compress_rates", None) or {}  # DeepSeek-V4 attends to whole windows of the past
    tokens = max(TOKENS, *(2 * rate for rate in windows.values()), 0)
    ids = torch.arange(1, tokens + 1)[None] * 7 % 200
    yield {"input_ids": ids}
    above = torch.ones(tokens, tokens).triu(1).bool()
    yield {"input_ids": ids, "attention_mask": torch.zeros(1, 1, tokens, tokens).masked_fill(above, -1e30)}
    yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    yield {"input_ids": ids.expand(getattr(model.config, "num_codebooks", 1), -1)}


@contextlib.contextmanager
def attention(function: Callable) -> Iterator[None]:
    """A function in transformers' AttentionInterface, for as long as the block runs."""
    AttentionInterface.register(ORACLE, function)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(ORACLE, None)


def first_calls(model: nn.Module) -> dict[nn.Module, Arguments]:
    """The arguments of every module's first call in a forward pass on a few tokens."""
    errors = []
    for inputs in inputs_for(model):
        calls: dict[nn.Module, Arguments] = {}

        def note(module: nn.Module, args: tuple, kwargs: dict, calls: dict = calls) -> None:
            fresh = {key: copy.deepcopy(value) if isinstance(value, Cache) else value for key, value in kwargs.items()}
            calls.setdefault(module, (args, fresh))

        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
        try:
            with torch.no_grad():
                model(**inputs, use_cache=False)
            return calls
        except Exception as error:
            errors.append(error)
        finally:
            for hook in hooks:
                hook.remove()
    raise errors[0]


class Enough(BaseException):
    """Stops a module once its attention has been reached."""


class Attentions:
    """What the attention modules of a model built with ORACLE hand to transformers' attention function.

    `again(module)` repeats the module's first call, so that changed parameters act on it alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []

        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple:
            if module not in self.modules:
                self.modules.append(module)
            return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]) + 0.1 * q.mean(), None

        with attention(attend):
            self._calls = first_calls(model)

    def arguments(self, module: nn.Module) -> Arguments:
        return self._calls[module]

    def again(self, module: nn.Module, like: Arguments | None = None) -> Seen:
        seen: list[Seen] = []

        def attend(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> None:
            seen.append((q.clone(), k.clone(), v.clone()))
            raise Enough

        args, kwargs = like or self._calls[module]
        with attention(attend), contextlib.suppress(Enough), torch.no_grad():
            module(*args, **kwargs)
        return seen[0]


@contextlib.contextmanager
def watched_softmax(seen: list[Tensor], *, uniform: bool = False) -> Iterator[None]:
    """Collects what every softmax returns; with `uniform` it returns equal probabilities instead."""

    def wrap(original: Callable) -> Callable:
        def softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = original(x, *args, **kwargs)
            seen.append(out.clone())
            return torch.full_like(out, 0.25) if uniform else out

        return softmax

    holders = ((torch, "softmax"), (F, "softmax"), (Tensor, "softmax"))
    originals = [getattr(holder, name) for holder, name in holders]
    try:
        for (holder, name), original in zip(holders, originals, strict=True):
            setattr(holder, name, wrap(original))
        yield
    finally:
        for (holder, name), original in zip(holders, originals, strict=True):
            setattr(holder, name, original)


Rows = dict[str, tuple[int, list[int]]]  # parameter -> (dimension, indices)


@contextlib.contextmanager
def changed(params: dict[str, nn.Parameter], rows: Rows) -> Iterator[None]:
    """Other numbers in some rows while the block runs; undone bit for bit."""
    before = {name: params[name].detach().clone() for name in rows}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, (dim, indices) in rows.items():
            noise = torch.randn(params[name].shape, generator=generator)
            index = torch.tensor(indices, dtype=torch.long)
            params[name].index_add_(dim, index, noise.index_select(dim, index))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                params[name].copy_(value)
