"""Running a model without its weights: answers for tensors on meta, and cheap stand-in memory on the CPU.

On meta, tensors have shapes but no values. Operations that ask for values (how many tokens chose this expert?) get an
answer from STAND_INS, as if nothing was selected, so that loops over chosen experts do nothing. Attention does not
depend on such answers; where it does, the replay on real numbers attends differently and the layout is refused.

On the CPU, `materialised` gives random numbers to the parameters under study and one repeated number to all others.
"""

from __future__ import annotations

import contextlib
import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

SEED = 20_260_731
PERIOD = 65_521  # prime, so that the rows of a filled weight never line up with the repeated block
STRIDE = 7_919  # prime: each tensor starts elsewhere in the block


def _item(tensor: Tensor) -> float | int:
    return 0.0 if tensor.is_floating_point() else 0


def _no(*_: Any) -> bool:
    return False


def _nonzero(tensor: Tensor) -> Tensor:
    return tensor.new_empty((0, tensor.dim()), dtype=torch.long)


def _to_copy(tensor: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """A copy to another device stays on meta."""
    return torch.empty_like(tensor, dtype=dtype or tensor.dtype, device="meta")


def _grouped_mm(lhs: Tensor, rhs: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The experts' product over groups of rows: PyTorch's own meta kernel insists on the GPU's bfloat16."""
    if offs is None:
        groups = rhs.shape[:-2]
    elif lhs.dim() == rhs.dim() == 2:
        groups = offs.shape
    else:
        groups = torch.Size()
    return lhs.new_empty((*groups, lhs.shape[-2], rhs.shape[-1]))


def _index(tensor: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """A boolean mask selects nothing: it becomes an empty list of positions for each of its dimensions."""
    positions: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool:
            positions += [index.new_empty(0, dtype=torch.long)] * index.dim()
        else:
            positions.append(index)
    return torch.ops.aten.index.Tensor(tensor, positions)


def _index_put(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor.clone()


def _index_put_(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor


STAND_INS: dict[str, Callable] = {
    "_local_scalar_dense": _item,
    "nonzero": _nonzero,
    "is_nonzero": _no,
    "equal": _no,
    "_to_copy": _to_copy,
    "_grouped_mm": _grouped_mm,
    "index": _index,
    "index_put": _index_put,
    "index_put_": _index_put_,
}
"""Operations, by their names below autograd, that are answered in place of running when their tensor is on meta."""


class Fill:
    """Random CPU tensors that are the same on every machine, on every rank and for any number of threads.

    All come from one block of normal numbers made by a private generator; big tensors repeat it.
    """

    def __init__(self, seed: int = 0) -> None:
        self._block = torch.randn(PERIOD, generator=torch.Generator().manual_seed(SEED + seed), dtype=torch.float32)
        self._offset = 0
        self._shared: dict[float, Tensor] = {}

    def normal(self, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        """A tensor of its own."""
        self._offset = (self._offset + STRIDE) % PERIOD
        return self._repeated(self._block.roll(self._offset).mul_(scale), torch.Size(shape).numel()).view(shape)

    def parameter(self, like: Tensor) -> nn.Parameter:
        """Gains near one for vectors; for matrices numbers small enough to keep activations near one.

        Matrices share their memory where they can, so nothing may be written to them.
        """
        if like.dim() < 2:
            return nn.Parameter(self.normal(like.shape, 0.1).add_(1))
        scale, count = max(like.shape) ** -0.5, like.numel()
        self._offset = (self._offset + STRIDE) % PERIOD
        start = -self._offset % PERIOD
        if scale not in self._shared or len(self._shared[scale]) < start + count:
            self._shared[scale] = self._repeated(self._block * scale, PERIOD + count)
        return nn.Parameter(self._shared[scale][start : start + count].view(like.shape))

    @staticmethod
    def _repeated(block: Tensor, count: int) -> Tensor:
        return block.repeat(-(-count // PERIOD))[:count]

    def input(self, like: Tensor) -> Tensor:
        """A stand-in for an input: random floats; integers as they are, or counting up where they are unknown.

        Boolean masks become a chequerboard: every token sees some others, whichever value means "hidden".
        """
        if like.is_floating_point():
            return self.normal(like.shape)
        if like.is_complex():
            return torch.complex(self.normal(like.shape), self.normal(like.shape))
        if not like.is_meta:
            return like.detach().clone()
        steps = torch.zeros((1,) * like.dim(), dtype=torch.long)
        for dim in range(like.dim())[-2:]:
            along = torch.arange(like.shape[dim])
            steps = steps + along.view(-1, *[1] * (like.dim() - 1 - dim))
        if like.dtype is torch.bool:
            steps = steps % 2
        return steps.to(like.dtype).expand(like.shape).clone()


@contextlib.contextmanager
def materialised(module: nn.Module, names: set[str], fill: Fill) -> Iterator[dict[str, nn.Parameter]]:
    """CPU tensors in place of the module's own while the block runs.

    The parameters called `names` are random, take gradients and are yielded by name; every other parameter is one
    number, repeated without taking memory. Tensors that the module shares stay shared.
    """
    originals: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}
    params: dict[str, nn.Parameter] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key, param in owner._parameters.items():
            if param is None:
                continue
            originals.append((owner._parameters, key, param))
            if id(param) in made:
                continue
            name = f"{prefix}.{key}" if prefix else key
            if name in names:
                made[id(param)] = params[name] = fill.parameter(param)
            else:
                made[id(param)] = _constant(param)
        for key, buffer in owner._buffers.items():
            if buffer is None:
                continue
            originals.append((owner._buffers, key, buffer))
            if id(buffer) not in made:
                made[id(buffer)] = fill.input(buffer)
    # The registries themselves are written to: setattr would refuse to change a meta parameter's device.
    try:
        for holder, key, tensor in originals:
            holder[key] = made[id(tensor)]
        yield params
    finally:
        for holder, key, tensor in originals:
            holder[key] = tensor


def _constant(like: Tensor) -> nn.Parameter:
    """A CPU parameter of any size in four bytes."""
    return nn.Parameter(torch.full((1,) * like.dim(), 0.01).expand(like.shape), requires_grad=False)


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
