"""A layer's queries and keys head by head: from compact tensors to batches of matrices, and back.

Restore methods and routing drift are formulas on one head's W_Q and W_K. Where the rows of a head lie (side by side,
gated, fused with the keys and values, transposed) is settled here, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qkguard.arrays import Array, double, library, like, zeros
from qkguard.layout.spec import AttentionSpec, ParamMap


@dataclass(frozen=True)
class HeadRows:
    """The rows of one role's heads in a layer's compact tensors.

    `index` (heads, d_k) are positions along the rows of the compact weight, `bias_index` of the compact bias, where
    there is one.
    """

    weight: ParamMap
    index: np.ndarray
    bias: ParamMap | None
    bias_index: np.ndarray | None

    def read(self, compact: Mapping[str, Array], with_bias: bool) -> Array:
        """(heads, d_k, d) in float64; `with_bias` appends the bias as one more column, zeros where there is none."""
        weight = _rows_first(self.weight, compact[self.weight.name])
        rows = double(weight[like(self.index, weight)])
        if not with_bias:
            return rows
        column = zeros((*rows.shape[:-1], 1), rows)
        if self.bias is not None and self.bias_index is not None:
            column[..., 0] = compact[self.bias.name][like(self.bias_index, weight)]
        return library(rows).concat([rows, column], -1)

    def write(self, rows: Array, into: Mapping[str, Array]) -> dict[str, Array]:
        """float64 copies of this role's compact tensors in `into`, with what `read` gives in place of its rows."""
        weight = double(into[self.weight.name], copy=True)
        width = weight.shape[1 - self.weight.dim]
        _rows_first(self.weight, weight)[like(self.index, weight)] = rows[..., :width]
        out = {self.weight.name: weight}
        if self.bias is not None and self.bias_index is not None:
            bias = double(into[self.bias.name], copy=True)
            bias[like(self.bias_index, bias)] = rows[..., width]
            out[self.bias.name] = bias
        return out


def _rows_first(param: ParamMap, weight: Array) -> Array:
    """A view whose rows make outputs, also of a transposed Conv1D."""
    return weight if param.dim == 0 else weight.mT


@dataclass(frozen=True)
class LayerHeads:
    """The queries and keys of a layer that has one weight for each, from inputs of the same size."""

    q: HeadRows
    k: HeadRows

    def read(self, compact: Mapping[str, Array]) -> tuple[Array, Array]:
        """Queries (heads, d_k, n) and keys (kv_heads, d_k, n) in float64, n = d or, where either has a bias, d + 1."""
        with_bias = self.q.bias is not None or self.k.bias is not None
        return self.q.read(compact, with_bias), self.k.read(compact, with_bias)

    def write(self, q: Array, k: Array, into: Mapping[str, Array]) -> dict[str, Array]:
        """float64 copies of the layer's compact tensors in `into`, with these queries and keys in them."""
        queries = self.q.write(q, into)
        return queries | self.k.write(k, {**into, **queries})  # queries and keys may lie in the same tensor


def find_heads(spec: AttentionSpec, maps: Sequence[ParamMap]) -> LayerHeads | str:
    """The heads of a layer's selected parameters, or why it has no W_Q and W_K head by head."""
    q = _head_rows(spec, maps, "q", spec.num_heads)
    k = _head_rows(spec, maps, "k", spec.num_kv_heads)
    if isinstance(q, str) or isinstance(k, str):
        return q if isinstance(q, str) else str(k)
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
    making = [p for p in spec.params if p.kind != "norm" and any(role in block.role for block in p.blocks)]
    if any(block.shared for p in making for block in p.blocks if role in block.role):
        return f"rows that make {name} make values too"
    weights = [p for p in making if p.kind == "weight"]
    biases = [p for p in making if p.kind == "bias"]
    if not weights:
        return f"the layer has no {name} of its own"
    if len(weights) > 1 or len(biases) > 1 or len(weights[0].shape) != 2:
        return f"{name} are made by several weights in turn ({', '.join(short_name(p) for p in weights)})"
    chosen = {p.name: p for p in maps}
    if any(p.name not in chosen for p in making):
        return f"the {name} belong to a layer before this one"
    weight = chosen[weights[0].name]
    bias = chosen[biases[0].name] if biases else None
    index = _index(weight, role, count)
    bias_index = None if bias is None else _index(bias, role, count)
    if index is None or (bias is not None and (bias_index is None or bias_index.shape != index.shape)):
        return f"the rows of {short_name(weight)} are not divided into {count} heads"
    return HeadRows(weight, index, bias, bias_index)


def _index(param: ParamMap, role: str, count: int) -> np.ndarray | None:
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
    return np.array(heads)
