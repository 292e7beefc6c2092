"""Tiny models of every causal-LM type, and what their attentions compute, measured without the package's own code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

CONFIGS = json.loads((Path(__file__).parent / "data" / "tiny_configs.json").read_text())
NAME = "oracle"
TOKENS = 6


def tiny_config(model_type: str) -> Any:
    """The config class of a type with overrides that make it tiny."""
    return AutoConfig.for_model(model_type, **CONFIGS[model_type]["overrides"])


def tiny_model(model_type: str, implementation: str = "eager") -> nn.Module:
    """A tiny random float32 model whose vectors (biases, gains) are random too, so that none of them hides."""
    torch.manual_seed(0)
    with attention(None) if implementation == NAME else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_config(tiny_config(model_type), attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * (0.1 if param.dim() > 1 else 0.3))
    return model


class Enough(BaseException):
    """Stops a forward pass after the attention of interest."""


def inputs_for(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Forms of text input, one of which every model accepts: no mask, 4-D mask, 2-D mask, several codebooks."""
    ids = torch.arange(1, TOKENS + 1)[None] * 7 % 200
    yield {"input_ids": ids}
    above = torch.ones(TOKENS, TOKENS).triu(1).bool()
    yield {"input_ids": ids, "attention_mask": torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(above, -1e30)}
    yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    yield {"input_ids": ids.expand(getattr(model.config, "num_codebooks", 1), -1)}


Seen = tuple[Tensor, Tensor, Tensor]  # q, k, v


class Attentions:
    """What the attention modules of a model built with `implementation=NAME` hand to transformers' attention function.

    `calls` holds, for every module that attends, the arguments of its first call; `again(module)` calls it once more
    with the same ones, so that changed parameters act on it alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[nn.Module, tuple[tuple, dict]] = {}
        arguments: dict[nn.Module, tuple[tuple, dict]] = {}

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            arguments[module] = (args, dict(kwargs))

        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple:
            self.calls.setdefault(module, arguments[module])
            return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]) + 0.1 * q.mean(), None

        hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules()]
        errors = []
        for inputs in inputs_for(model):
            self.calls.clear()
            try:
                with attention(attend), torch.no_grad():
                    model(**inputs, use_cache=False)
                break
            except Exception as error:
                errors.append(error)
        else:
            raise errors[0]
        for hook in hooks:
            hook.remove()

    def again(self, module: nn.Module) -> Seen:
        seen: list[Seen] = []

        def attend(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> None:
            seen.append((q.clone(), k.clone(), v.clone()))
            raise Enough

        args, kwargs = self.calls[module]
        with attention(attend), contextlib.suppress(Enough), torch.no_grad():
            module(*args, **kwargs)
        return seen[0]


@contextlib.contextmanager
def attention(function: Any) -> Iterator[None]:
    AttentionInterface.register(NAME, function)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(NAME, None)


@contextlib.contextmanager
def changed(params: dict[str, nn.Parameter], rows: dict[str, tuple[int, list[int]]]) -> Iterator[None]:
    """Random numbers added to some rows: name -> (dimension, indices). Exactly undone afterwards."""
    before = {name: params[name].detach().clone() for name in rows}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, (dim, indices) in rows.items():
            if indices:
                noise = torch.randn(params[name].shape, generator=generator)
                index = torch.tensor(indices)
                params[name].index_add_(dim, index, noise.index_select(dim, index))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                params[name].copy_(value)
