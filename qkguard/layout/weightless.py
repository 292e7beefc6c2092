"""Stand-ins for operations that ask for values, for tensors on meta, which have none.

They answer as if nothing was selected, so that loops over chosen experts do nothing. Attention does not hang on such
questions; where it does, the replay on real numbers attends differently, and the layout is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _item(tensor: Tensor) -> float | int:
    return 0.0 if tensor.is_floating_point() else 0


def _nonzero(tensor: Tensor) -> Tensor:
    return tensor.new_empty((0, tensor.dim()), dtype=torch.long)


def _to_copy(tensor: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """Wherever it is to be copied: it stays on meta."""
    return torch.empty_like(tensor, dtype=dtype or tensor.dtype, device="meta")


def _grouped_mm(lhs: Tensor, rhs: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The product over groups of rows, which PyTorch checks on meta as if it ran on a GPU in bfloat16."""
    groups = rhs.shape[:-2] if offs is None else offs.shape if lhs.dim() == rhs.dim() == 2 else ()
    return lhs.new_empty((*groups, lhs.shape[-2], rhs.shape[-1]))


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with a boolean mask replaced by empty lists of positions, one for each of its dimensions."""
    out: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool:
            out += [index.new_empty(0, dtype=torch.long)] * index.dim()
        else:
            out.append(index)
    return out


def _index(tensor: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    return torch.ops.aten.index.Tensor(tensor, _without_masks(indices))


def _index_put(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor.clone()


def _index_put_(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor


STAND_INS: dict[str, Callable] = {
    "_local_scalar_dense": _item,
    "nonzero": _nonzero,
    "is_nonzero": lambda _: False,
    "equal": lambda *_: False,
    "_to_copy": _to_copy,
    "_grouped_mm": _grouped_mm,
    "index": _index,
    "index_put": _index_put,
    "index_put_": _index_put_,
}
