"""Drift between two checkpoints on disk, a layer at a time: the numbers of METHOD's Drift section without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qkguard.drift import Sums, difference_sums
from qkguard.layout.spec import Block, ParamMap


def rows_drift(post: Tensor, pre: Tensor) -> Sums:
    """The sums of drift over two tensors of one shape."""
    flat, before = post.reshape(-1), pre.reshape(-1)
    moved, cross = difference_sums(flat, before).tolist()
    zeros = torch.zeros((), dtype=pre.dtype).expand(before.numel())
    return Sums(moved, cross, float(difference_sums(before, zeros)[0]))


def block_drift(param: ParamMap, pre: Tensor, post: Tensor) -> list[tuple[Block, Sums]]:
    """Sums for every block (rows of one role and head) of one parameter's compact tensors."""
    return [
        (block, rows_drift(post.narrow(param.dim, lo, hi - lo), pre.narrow(param.dim, lo, hi - lo)))
        for block, lo, hi in param.compact_blocks()
    ]


def add(sums: Sequence[Sums]) -> Sums:
    """Sums over the union of disjoint sets of elements."""
    return Sums(*(sum(column) for column in zip(*sums, strict=True)))


def projection_drift(
    params: Sequence[ParamMap], pre: Mapping[str, Tensor], post: Mapping[str, Tensor]
) -> dict[str, float]:
    """{q,k}_rel and {q,k}_1mcos of one layer's W_Q and W_K, from compact tensors before and after SFT.

    As in the metrics of training: all weights of a role count as one vector, biases and norms are left out, rows that
    feed both queries and keys count for both.
    """
    blocks = [pair for p in params if p.kind == "weight" for pair in block_drift(p, pre[p.name], post[p.name])]
    out: dict[str, float] = {}
    for role in "qk":
        if mine := [sums for block, sums in blocks if role in block.role]:
            total = add(mine)
            out |= {f"{role}_rel": total.rel, f"{role}_1mcos": total.one_minus_cos}
    return out
