"""A layer's queries and keys head by head: from compact tensors to batches of matrices, and back.

The methods beyond copying are formulas on one head's W_Q and W_K. Where the rows of a head lie (side by side, gated,
fused with the keys and values, transposed) is settled here, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkguard.layout.spec import AttentionSpec, ParamMap


@dataclass(frozen=True)
class HeadRows:
    """The rows of one role's heads in a layer's compact tensors.

    `index` (heads, d_k) are positions along the rows of the compact weight, `bias_index` of the compact bias, where
    there is one.
    """

    weight: ParamMap
    index: Tensor
    bias: ParamMap | None
    bias_index: Tensor | None

    def read(self, compact: Mapping[str, Tensor], augmented: bool) -> Tensor:
        """(heads, d_k, d) in float64; `augmented` appends the bias as one more column, zeros where there is none."""
        weight = compact[self.weight.name].double()
        rows = (weight if self.weight.dim == 0 else weight.mT)[self.index.to(weight.device)]
        if not augmented:
            return rows
        column = rows.new_zeros(*rows.shape[:-1], 1)
        if self.bias is not None and self.bias_index is not None:
            column[..., 0] = compact[self.bias.name].double()[self.bias_index.to(weight.device)]
        return torch.cat([rows, column], -1)

    def write(self, compact: dict[str, Tensor], rows: Tensor) -> None:
        """Put what `read` gives into float64 compact tensors, in place."""
        weight = compact[self.weight.name]
        width = weight.shape[1 - self.weight.dim]
        (weight if self.weight.dim == 0 else weight.mT)[self.index.to(weight.device)] = rows[..., :width]
        if self.bias is not None and self.bias_index is not None:
            compact[self.bias.name][self.bias_index.to(weight.device)] = rows[..., width]


@dataclass(frozen=True)
class LayerHeads:
    """The queries and keys of a layer that has one weight for each, from inputs of the same size."""

    q: HeadRows
    k: HeadRows

    @property
    def augmented(self) -> bool:
        """Whether the maps are affine: their bias is one more column, for the input that is always 1."""
        return self.q.bias is not None or self.k.bias is not None

    def read(self, compact: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries (heads, d_k, n) and keys (kv_heads, d_k, n) in float64, n = d or, with biases, d + 1."""
        return self.q.read(compact, self.augmented), self.k.read(compact, self.augmented)

    def write(self, q: Tensor, k: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compact float64 tensors of every parameter with these queries and keys in them."""
        params = (self.q.weight, self.q.bias, self.k.weight, self.k.bias)
        out = {p.name: like[p.name].to(torch.float64, copy=True) for p in params if p is not None}
        self.q.write(out, q)
        self.k.write(out, k)
        return out


def find_heads(spec: AttentionSpec, maps: Sequence[ParamMap]) -> LayerHeads | str:
    """The heads of a layer's selected parameters, or why it has no W_Q and W_K head by head."""
    found = []
    for role, count in (("q", spec.num_heads), ("k", spec.num_kv_heads)):
        rows = _head_rows(spec, maps, role, count)
        if isinstance(rows, str):
            return rows
        found.append(rows)
    q, k = found
    if q.index.shape[1] != k.index.shape[1] or len(q.index) % len(k.index):
        return f"query heads {tuple(q.index.shape)} and key heads {tuple(k.index.shape)} do not fit together"
    if q.weight.shape[1 - q.weight.dim] != k.weight.shape[1 - k.weight.dim]:
        return "queries and keys are made from inputs of different sizes"
    return LayerHeads(q, k)


def short_name(param: ParamMap) -> str:
    """A parameter's name within its attention module, the same in every layer: "q_proj.weight"."""
    return ".".join(param.name.split(".")[-2:])


def _head_rows(spec: AttentionSpec, maps: Sequence[ParamMap], role: str, count: int) -> HeadRows | str:
    name = {"q": "queries", "k": "keys"}[role]
    making = [p for p in spec.params if any(role in b.role for b in p.blocks)]
    if any(b.shared for p in making for b in p.blocks if role in b.role and p.kind != "norm"):
        return f"rows that make {name} make values too"
    weights = [p for p in making if p.kind == "weight"]
    biases = [p for p in making if p.kind == "bias"]
    if not weights:
        return f"the layer has no {name} of its own"
    if len(weights) > 1 or len(biases) > 1 or len(weights[0].shape) != 2:
        return f"{name} are made by several weights in turn ({', '.join(short_name(p) for p in weights)})"
    chosen = {p.name: p for p in maps}
    if any(p.name not in chosen for p in weights + biases):
        return f"the {name} belong to a layer before this one"
    weight, bias = chosen[weights[0].name], (chosen[biases[0].name] if biases else None)
    index = _index(weight, role, count)
    bias_index = None if bias is None else _index(bias, role, count)
    if index is None or (bias is not None and (bias_index is None or bias_index.shape != index.shape)):
        return f"the rows of {short_name(weight)} are not divided into {count} heads"
    return HeadRows(weight, index, bias, bias_index)


def _index(param: ParamMap, role: str, count: int) -> Tensor | None:
    """(heads, d_k) positions of a role's rows in the compact tensor; None where they are not laid out by head."""
    heads: list[list[int]] = [[] for _ in range(count)]
    for block, lo, hi in param.compact_blocks():
        if role not in block.role:
            continue
        if block.role != role or block.head is None or block.head >= count:
            return None
        heads[block.head] += range(lo, hi)
    if not heads[0] or len({len(rows) for rows in heads}) != 1:
        return None
    return torch.tensor(heads)
