"""The restored adapters in the live model: forward passes in which adapters move queries and keys less, or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from qkguard.adapters.live import AdaptedWeight


@contextmanager
def scaled_adapters(weights: Sequence[AdaptedWeight], share: float = 0.0) -> Iterator[None]:
    """Inside the block adapters move queries and keys by `share` of what they do otherwise.

    Nothing but hooks: no weight is touched, so it is the same on plain and sharded models. Gives the model that the
    restored adapter of the same step gives (`write_restored_adapter`), or the merge. For DoRA, share must be 0.
    """
    with ExitStack() as stack:
        for weight in weights:
            if weight.layer is None:
                continue
            if weight.dora:
                stack.enter_context(_hooked(weight.layer, _base_rows(weight)))
                continue
            scale = _scale_rows(weight, share)
            for name in weight.adapters:
                stack.enter_context(_hooked(weight.layer.lora_B[name], scale))
        yield


@contextmanager
def _hooked(module: Any, hook: Callable[..., Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _base_rows(weight: AdaptedWeight) -> Callable[..., Tensor]:
    def replace(layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """`output` is (..., rows of the weight), base and adapters together."""
        base, out = layer.base_layer(*args), output.clone()
        for start, stop in weight.pmap.ranges:
            out[..., start:stop] = base[..., start:stop]
        return out

    return replace


def _scale_rows(weight: AdaptedWeight, share: float) -> Callable[..., Tensor]:
    def scale(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """`output` is (..., rows of the weight): what the adapter adds, before its scaling."""
        out = output.clone()
        for start, stop in weight.pmap.ranges:
            out[..., start:stop] *= share
        return out

    return scale
