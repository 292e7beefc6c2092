"""What gradients say of a replayed attention: which slices of a parameter reach q, k and v, in which head, and how
positions enter.

Gradients here are yes-or-no answers: where one is exactly zero, nothing leads from that number to the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qkguard.errors import UnknownLayoutError
from qkguard.layout.weightless import Fill

Params = Mapping[str, nn.Parameter]
Masks = tuple[Tensor, ...]
"""For every dimension of a parameter, which slices along it (bool, 1-D)."""

TRIES = 4  # random vectors that a one-element slice is compared on: chance agreement in all of them is negligible
SAMPLED = 128  # elements of a slice that are compared; a few would do, as each must agree
# Of float32 gradients: far above their rounding (1e-7 a number), far below what another head's part adds (order 1).
PARALLEL = 1e-5
WHOLE_NUMBER = 1e-3


def reach(target: Tensor, params: Params) -> dict[str, Masks]:
    """The slices of every parameter that lead to `target`; parameters that do not lead there are left out.

    By a random combination of the target's elements, so that opposite signs do not cancel.

    Raises:
        UnknownLayoutError: a gradient is not finite.
    """
    out: dict[str, Masks] = {}
    for name, grad in _gradients(target, Fill(2).normal(target.shape), params).items():
        if not bool(grad.sum().isfinite()):
            raise UnknownLayoutError(f"{name}: the gradient of a replay is not finite")
        hit = grad != 0
        if bool(hit.any()):
            out[name] = tuple(_any_along(hit, dim) for dim in range(hit.dim()))
    return out


def _any_along(hit: Tensor, dim: int) -> Tensor:
    return hit if hit.dim() == 1 else hit.movedim(dim, 0).flatten(1).any(1)


def union(found: Sequence[dict[str, Masks]]) -> dict[str, Masks]:
    """The slices that any of several targets reaches."""
    out: dict[str, Masks] = {}
    for masks in found:
        for name, by_dim in masks.items():
            out[name] = tuple(a | b for a, b in zip(out.get(name, by_dim), by_dim, strict=True))
    return out


def output_dims(owner: nn.Module, masks: Sequence[Masks]) -> list[int]:
    """The dimensions of a parameter that may index its outputs, likeliest first.

    Those that keep q, k and v apart best. Among them the usual one first: the first of a matrix, a vector and a
    convolution; the second of transformers' transposed Conv1D; the last but one of a stack of matrices (experts).

    Args:
        owner: the module that owns the parameter.
        masks: the slices that reach q, k and v.
    """
    from transformers.pytorch_utils import Conv1D

    dims = len(masks[0])
    if dims > 2 and not isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        usual = dims - 2
    else:
        usual = int(dims == 2 and isinstance(owner, Conv1D))
    shared = []  # by dimension, the share of slices that reach more than one of q, k and v
    for dim in range(dims):
        reached = torch.stack([by_dim[dim] for by_dim in masks]).sum(0)
        shared.append(float((reached > 1).float().mean()))
    best = [dim for dim in range(dims) if shared[dim] == min(shared)]
    return [usual] * (usual in best) + [dim for dim in best if dim != usual]


def distinct_heads(key: Tensor) -> list[int]:
    """Key-value head of every key head as attended: equal heads, bit for bit, are copies of one (grouped queries)."""
    firsts: list[int] = []
    heads: list[int] = []
    for head in range(key.shape[1]):
        same = [i for i, first in enumerate(firsts) if torch.equal(key[:, first], key[:, head])]
        if not same:
            firsts.append(head)
        heads.append(same[0] if same else len(firsts) - 1)
    return heads


def single_heads(
    target: Tensor, head_of: list[int], params: Params, dims: Mapping[str, list[int]]
) -> dict[str, tuple[int, Tensor]]:
    """Per parameter in `dims`: a dimension, and the one head that each slice along it feeds, or -1.

    Of the possible dimensions, the first along which some slice feeds a single head, else the first.

    The gradient is linear in what is fed back. Fed back once as it is and once with head h multiplied by h + 1, a
    slice that feeds one head alone comes out multiplied by exactly that number, in all its elements.

    Args:
        target: (1, heads, tokens, channels) queries or keys, with their graph.
        head_of: the head that each of the target's heads is a copy of (`distinct_heads`).
        params: parameters by name.
        dims: the dimensions that may index outputs (`output_dims`).
    """
    is_first = torch.tensor([head not in head_of[:i] for i, head in enumerate(head_of)]).view(1, -1, 1, 1)
    factor = torch.tensor(head_of, dtype=torch.float32).view(1, -1, 1, 1) + 1
    fill = Fill(3)
    samples: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}
    matrices = {name: params[name] for name in dims if params[name].dim() > 1}
    vectors = {name: params[name] for name in dims if params[name].dim() == 1}
    # A slice of a matrix has many elements to compare; a vector's one element needs several random tries.
    for some in (matrices, *[vectors] * TRIES):
        back = fill.normal(target.shape) * is_first
        for side, fed in enumerate((back, back * factor)):
            for name, grad in _gradients(target, fed, some).items():
                for dim in dims[name]:
                    samples.setdefault((name, dim), ([], []))[side].append(_sample(grad, dim))
    out: dict[str, tuple[int, Tensor]] = {}
    for (name, dim), (plain, multiplied) in samples.items():
        head = _decode(torch.cat(plain, 1), torch.cat(multiplied, 1), max(head_of) + 1)
        if name not in out or (bool((head >= 0).any()) and not bool((out[name][1] >= 0).any())):
            out[name] = dim, head
    return out


def _sample(grad: Tensor, dim: int) -> Tensor:
    """(slices along `dim`, some of their elements), in float64: enough to tell a common factor."""
    if grad.dim() == 1:
        return grad[:, None].double()
    slices = grad.movedim(dim, 0).flatten(1)
    return slices[:, :: max(1, slices.shape[1] // SAMPLED)].double()


def _decode(plain: Tensor, multiplied: Tensor, heads: int) -> Tensor:
    """The head by whose factor each row of `plain` was multiplied; -1 where no one factor explains it."""
    aa, ab, bb = (plain * plain).sum(1), (plain * multiplied).sum(1), (multiplied * multiplied).sum(1)
    ratio = ab / aa
    factor = ratio.round()
    parallel = ab * ab >= (1 - PARALLEL) * aa * bb
    single = (aa > 0) & parallel & ((ratio - factor).abs() < WHOLE_NUMBER) & (factor >= 1) & (factor <= heads)
    return torch.where(single, factor - 1, torch.full_like(factor, -1)).long()


def _gradients(target: Tensor, back: Tensor, params: Params) -> dict[str, Tensor]:
    if not target.requires_grad or not params:
        return {}
    grads = torch.autograd.grad(target, list(params.values()), back, retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}


def rotary_pairing(
    query: Tensor, heads: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> tuple[str | None, int, int]:
    """("half" | "interleaved" | "none", rotated channels, the first of them) of the first query head.

    (None, 0, 0) where it is neither.

    A rotation makes each channel of the query from two rows of the projection; which two tells the pairing. For
    DeepSeek's interleaved rotation the rows are what is interleaved, whatever order the channels end up in.

    Args:
        query: (1, heads, tokens, channels), with its graph, normalisation statistics held fixed.
        heads: per parameter, the query head that each row feeds.
        outputs: what came out of the module that owns each parameter.
    """
    for name, head in heads.items():
        output = outputs.get(name)
        rows = (head == 0).nonzero().flatten()
        if output is not None and len(rows) == query.shape[-1] and output.shape[-1] == len(head):
            return _classify(_made_of(query, output, rows))
    return None, 0, 0


def _made_of(query: Tensor, output: Tensor, rows: Tensor) -> list[list[int]]:
    """For every channel of the first query head, the projection's rows that it is made of (as places in `rows`).

    Each token but the first, which may sit at angle zero, is asked about another channel in the same backward pass.
    """
    channels, last = query.shape[-1], query.shape[2] - 1
    made_of = []
    for start in range(0, channels, last):
        asked = range(start, min(start + last, channels))
        back = torch.zeros_like(query)
        for token, channel in enumerate(asked, 1):
            back[0, 0, token, channel] = 1
        (grad,) = torch.autograd.grad(query, output, back, retain_graph=True)
        by_token = grad.reshape(-1, query.shape[2], grad.shape[-1])[..., rows].any(0)
        made_of += [by_token[token].nonzero().flatten().tolist() for token, _ in enumerate(asked, 1)]
    return made_of


def _classify(made_of: list[list[int]]) -> tuple[str | None, int, int]:
    """Per channel the rows that it is made of -> pairing, number of rotated channels, the first of them."""
    unknown = None, 0, 0
    if any(len(rows) not in (1, 2) for rows in made_of):
        return unknown
    pairs = sorted({tuple(rows) for rows in made_of if len(rows) == 2})
    if not pairs:
        return "none", 0, 0
    first, count = pairs[0][0], len(pairs)
    if sorted(row for pair in pairs for row in pair) != list(range(first, first + 2 * count)):
        return unknown
    apart = {b - a for a, b in pairs}
    if apart == {count}:
        return "half", 2 * count, first
    return ("interleaved", 2 * count, first) if apart == {1} else unknown
