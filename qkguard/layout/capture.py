"""Where a forward pass attends: calls of transformers' attention function, softmaxes over products of activations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qkguard.layout.trace import BETWEEN, PRODUCT, SOFTMAX, Call, Operation, Trace, walk

ATTENTION_NAME = "qkguard_discovery"  # no mask is registered under it, so transformers builds none


class StopForward(BaseException):
    """Ends a forward pass once everything asked for was seen; not an Exception, so that no model code swallows it."""


@dataclass(eq=False)
class Attention:
    """One attention, by the numbers that its query, key and value have in the trace.

    Through the attention function these are (1, heads, tokens, channels). Behind a softmax they are the operands of
    batched products, (heads, tokens, channels) in some order; `scores` and `dim` are the softmax's input and axis
    (None and -1 through the attention function).
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
        # transformers (5.17 to 5.23) can register a function but not take one back.
        AttentionInterface._global_mapping.pop(ATTENTION_NAME, None)


def attend_with(model: nn.Module, name: str) -> None:
    """Point every config inside a private copy at the attention function registered as `name`.

    Through the private field: the public `set_attn_implementation` (transformers 5.17 to 5.23) leaves out classes that
    do not declare the attention registry, and some of those use it in a submodule.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = name


@contextlib.contextmanager
def watching(trace: Trace, *, enough: int | None = None) -> Iterator[list[Attention]]:
    """Record what runs inside the block; the yielded list holds its attentions, in order, once the block is left.

    With `enough`, the block ends quietly at that many calls of the attention function.
    """
    direct: list[Attention] = []
    found: list[Attention] = []

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> tuple:
        assert trace.call is not None
        q, k, v = (trace.number(tensor) for tensor in (query, key, value))
        direct.append(Attention(trace.call, len(trace.operations), q, k, v, options))
        if len(direct) == enough:
            raise StopForward
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    visible = sdpa_kernel(SDPBackend.MATH)  # PyTorch's other kernels would hide the softmax inside one operation
    with visible, contextlib.suppress(StopForward), attention_function(attend), trace.recording():
        yield found
    found.extend(sorted([*direct, *_softmaxes(trace)], key=attrgetter("at")))


def _softmaxes(trace: Trace) -> list[Attention]:
    """Attentions that the model's own code computes: softmax of a product of two activations, times a third."""
    out = []
    for at, operation in enumerate(trace.operations):
        if operation.name not in SOFTMAX or operation.call is None:
            continue
        product = _product_before(trace, operation.inputs[0])
        value = None if product is None else _product_after(trace, operation.outputs[0])
        if product is None or value is None:
            continue
        lhs, rhs = product.inputs[-2:]
        dim = next(c for c in operation.constants[1:] if isinstance(c, int))
        out.append(Attention(operation.call, at, lhs, rhs, value, scores=operation.inputs[0], dim=dim))
    return out


def _product_before(trace: Trace, scores: int) -> Operation | None:
    """The product of two activations that a softmax's input is made from, by nothing but masks, scales and views."""

    def made_from(number: int) -> tuple[int, ...]:
        maker = trace.maker(number) if number in trace.activations else None
        return maker.inputs if maker is not None and maker.name in BETWEEN else ()

    for number in walk([scores], made_from):
        maker = trace.maker(number)
        if maker is not None and maker.name in PRODUCT and trace.activations.issuperset(maker.inputs[-2:]):
            return maker
    return None


def _product_after(trace: Trace, probabilities: int) -> int | None:
    """The activation that the probabilities are multiplied with."""

    def made_of(number: int) -> Iterator[int]:
        for operation in trace.readers.get(number, []):
            if operation.name in BETWEEN:
                yield from operation.outputs

    for number in walk([probabilities], made_of):
        for operation in trace.readers.get(number, []):
            others = [operand for operand in operation.inputs[-2:] if operand != number]
            if operation.name in PRODUCT and others and others[0] in trace.activations:
                return others[0]
    return None
