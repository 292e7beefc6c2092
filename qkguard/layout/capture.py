"""Where a forward pass attends: calls of transformers' attention function, softmaxes over products of activations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qkguard.layout.trace import BETWEEN, PRODUCT, SOFTMAX, Call, Node, Trace

ATTENTION_NAME = "qkguard_discovery"  # no mask is registered under it, so transformers builds none


class StopReplay(BaseException):
    """Ends a replay once everything asked for has been seen; not an Exception, so that no model code swallows it."""


@dataclass(eq=False)
class Seen:
    """One attention: the keys (in the trace) of its query-side, key-side and value operand.

    Through the attention function these are (1, heads, tokens, channels). Behind a softmax they are the operands of
    batched products, (heads, tokens, channels) in some order; `scores` and `dim` are the softmax's input and axis.
    """

    call: Call  # innermost call around it
    at: int  # number of operations before it
    query: int
    key: int
    value: int
    options: dict[str, Any] = field(default_factory=dict)
    scores: int | None = None
    dim: int = -1


@contextlib.contextmanager
def attention_function(function: Callable) -> Iterator[None]:
    """`function` under ATTENTION_NAME in transformers' AttentionInterface, and gone afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, function)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(ATTENTION_NAME, None)


def attend_with(model: nn.Module, name: str) -> None:
    """Point every config inside a private copy at the attention function registered as `name`."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = name


@contextlib.contextmanager
def watching(trace: Trace, *, enough: int | None = None) -> Iterator[list[Seen]]:
    """Record what runs inside the block and list its attentions, in order, once the block is left.

    With `enough`, the block ends (quietly) at that many calls of the attention function.
    """
    direct: list[Seen] = []
    seen: list[Seen] = []

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> tuple:
        assert trace.call is not None
        q, k, v = (trace.key(tensor) for tensor in (query, key, value))
        direct.append(Seen(trace.call, len(trace.nodes), q, k, v, options))
        if len(direct) == enough:
            raise StopReplay
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    plain = sdpa_kernel(SDPBackend.MATH)  # so that PyTorch's own attention shows its softmax too
    with plain, contextlib.suppress(StopReplay), attention_function(attend), trace.recording():
        yield seen
    seen.extend(sorted([*direct, *_softmaxes(trace)], key=lambda found: found.at))


def _softmaxes(trace: Trace) -> list[Seen]:
    """Attentions that the model's own code computes: softmax of a product of two activations, times a third."""
    out = []
    for at, node in enumerate(trace.nodes):
        if node.op not in SOFTMAX:
            continue
        scores = _product_before(trace, node.inputs[0])
        if scores is None or node.call is None:
            continue
        after = _product_after(trace, node.outputs[0])
        if after is None:
            continue
        lhs, rhs = scores.inputs[-2:]
        dim = next(c for c in node.constants[1:] if isinstance(c, int))
        out.append(Seen(node.call, at, lhs, rhs, after, scores=node.inputs[0], dim=dim))
    return out


def _product_before(trace: Trace, key: int) -> Node | None:
    """The product of two activations that a softmax's input is made from, by nothing but masks, scales and views."""
    todo, seen = [key], {key}
    while todo:
        key = todo.pop(0)
        node = trace.nodes[trace.made_by[key]] if key in trace.made_by else None
        if node is None or key not in trace.active:
            continue
        if node.op in PRODUCT:
            if all(operand in trace.active for operand in node.inputs[-2:]):
                return node
        elif node.op in BETWEEN:
            fresh = [i for i in node.inputs if i not in seen]
            seen.update(fresh)
            todo.extend(fresh)
    return None


def _product_after(trace: Trace, key: int) -> int | None:
    """Key of the activation that the probabilities are multiplied with."""
    todo, seen = [key], {key}
    while todo:
        key = todo.pop(0)
        for node in trace.readers.get(key, []):
            if node.op in PRODUCT:
                other = [operand for operand in node.inputs[-2:] if operand != key]
                if other and other[0] in trace.active:
                    return other[0]
            elif node.op in BETWEEN:
                fresh = [o for o in node.outputs if o not in seen]
                seen.update(fresh)
                todo.extend(fresh)
    return None
