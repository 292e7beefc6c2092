"""One forward pass of a weightless model: which modules attend, and with what arguments they were called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.errors import UnknownLayoutError
from qkguard.layout.build import first_line

ATTENTION_NAME = "qkguard_discovery"  # no mask is registered under it, so transformers builds none
TOKENS = 4


@dataclass
class Call:
    """One call of one module: `path` is the chain of module names from the root down to it."""

    module: nn.Module
    path: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Capture:
    """Queries, keys and values as one attention call received them: (1, heads, tokens, channels)."""

    call: Call
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def attention_function(function: Callable) -> Iterator[None]:
    """`function` under ATTENTION_NAME in transformers' AttentionInterface, and gone afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, function)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(ATTENTION_NAME, None)


@contextlib.contextmanager
def call_stack(model: nn.Module) -> Iterator[list[Call]]:
    """The calls in progress, outermost first, kept by hooks that are removed at the end."""
    stack: list[Call] = []
    handles = []

    def enter(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            path = (*stack[-1].path, name) if stack else (name,)
            stack.append(Call(module, path, args, kwargs))

        return hook

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        stack.pop()

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module) -> list[Capture]:
    """Forward `TOKENS` tokens through a meta copy set to ATTENTION_NAME and list its attention calls in order.

    Most models want no mask, some a two-dimensional and some (sparse indexers) a four-dimensional one.
    """
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    masks = {
        "no mask": None,
        "2-D mask": torch.ones(1, TOKENS, dtype=torch.long, device="meta"),
        "4-D mask": torch.zeros(1, 1, TOKENS, TOKENS, device="meta"),
    }
    errors = {}
    for name, mask in masks.items():
        captures: list[Capture] = []
        try:
            with call_stack(model) as stack, attention_function(_recorder(stack, captures)), torch.device("meta"):
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            return captures
        except Exception as error:  # the model's own code: any failure means "try the next form of input"
            errors[name] = first_line(error)
    raise UnknownLayoutError(
        f"{type(model).__name__} does not run without weights ("
        + "; ".join(f"{name}: {error}" for name, error in errors.items())
        + "); pass the layout by hand: spec=FILE.yaml"
    )


def _recorder(stack: list[Call], captures: list[Capture]) -> Callable:
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple:
        call = next(c for c in reversed(stack) if c.module is module)
        captures.append(Capture(call, query, key, value, options))
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    return attend
