"""Memory for a weightless module: random numbers where they matter, one repeated number elsewhere."""

from __future__ import annotations

import contextlib
import copy
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

SEED = 20_260_731
PERIOD = 65_521  # prime, so that the rows of a filled weight never line up


class Fill:
    """Random CPU tensors that are the same on every machine, rank and number of threads.

    All come from one block of normal numbers made by a private generator; big tensors repeat it.
    """

    def __init__(self, seed: int = 0) -> None:
        self._block = torch.randn(PERIOD, generator=torch.Generator().manual_seed(SEED + seed), dtype=torch.float32)
        self._offset = 0

    def normal(self, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        count = torch.Size(shape).numel()
        self._offset = (self._offset + 7_919) % PERIOD
        block = self._block.roll(self._offset).mul_(scale)
        return block.repeat(-(-count // PERIOD))[:count].view(shape)

    def parameter(self, like: Tensor) -> nn.Parameter:
        """Gains near one for vectors; for matrices numbers small enough to keep activations near one."""
        if like.dim() < 2:
            return nn.Parameter(self.normal(like.shape, 0.1).add_(1))
        return nn.Parameter(self.normal(like.shape, max(like.shape) ** -0.5))

    def input(self, like: Tensor) -> Tensor:
        """A stand-in for an input: random floats; integers as they are, or counting up where unknown.

        Masks come out as a chequerboard, so that every token sees some others whichever value means "hidden".
        """
        if like.is_floating_point():
            return self.normal(like.shape)
        if like.is_complex():
            return torch.complex(self.normal(like.shape), self.normal(like.shape))
        if not like.is_meta:
            return like.detach().clone()
        steps = sum(
            (torch.arange(n).view(-1, *[1] * i) for i, n in enumerate(like.shape[:-3:-1])),
            torch.zeros(1, dtype=torch.long),
        )
        if like.dtype is torch.bool:
            steps = steps % 2
        return steps.to(like.dtype).expand(like.shape).clone()


def constant(like: Tensor) -> nn.Parameter:
    """A CPU parameter of any size in four bytes."""
    return nn.Parameter(torch.full((1,) * like.dim(), 0.01).expand(like.shape), requires_grad=False)


@contextlib.contextmanager
def materialised(module: nn.Module, feeding: set[str], fill: Fill) -> Iterator[dict[str, nn.Parameter]]:
    """CPU tensors in place of the module's own while the block runs.

    Parameters named in `feeding` are random and yielded by name, with gradients; the others are constant.
    Parameters and buffers that are shared stay shared.
    """
    originals: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}
    params: dict[str, nn.Parameter] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key, param in owner._parameters.items():
            if param is None:
                continue
            originals.append((owner._parameters, key, param))
            if id(param) not in made:
                name = f"{prefix}.{key}" if prefix else key
                new = fill.parameter(param) if name in feeding else constant(param)
                if name in feeding:
                    params[name] = new
                made[id(param)] = new
        for key, buffer in owner._buffers.items():
            if buffer is not None:
                originals.append((owner._buffers, key, buffer))
                if id(buffer) not in made:
                    made[id(buffer)] = fill.input(buffer)
    try:
        for holder, key, tensor in originals:
            holder[key] = made[id(tensor)]
        yield params
    finally:
        for holder, key, tensor in originals:
            holder[key] = tensor


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a nested structure (lists, tuples, dicts, dataclasses, caches) with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        new = copy.copy(value)
        new.update({key: map_tensors(item, change) for key, item in value.items()})
        return new
    if isinstance(value, UserDict) or is_dataclass(value) or type(value).__module__ == "transformers.cache_utils":
        new = copy.copy(value)
        vars(new).update({key: map_tensors(item, change) for key, item in vars(value).items()})
        return new
    return value


def inputs_like(value: Any, fill: Fill) -> Any:
    """A call's arguments with CPU stand-ins for its tensors; one tensor passed twice stays one tensor."""
    made: dict[int, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = fill.input(tensor)
        return made[id(tensor)]

    return map_tensors(value, change)
