"""Run one attention module with random weights and inputs, and see by gradients which rows make q, k and v."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.errors import UnknownLayoutError
from qkguard.layout.capture import Seen, watching
from qkguard.layout.geometry import output_dims
from qkguard.layout.materialise import Fill, inputs_like, materialised
from qkguard.layout.modes import FixedStatistics, StraightThrough
from qkguard.layout.rotary import pairing
from qkguard.layout.trace import Call, Trace


@dataclass(frozen=True)
class Rows:
    """Slices of one parameter along its output dimension: which feed q, k, v, and which single head (-1: not one)."""

    shape: tuple[int, ...]
    dim: int
    q: Tensor
    k: Tensor
    v: Tensor
    q_head: Tensor
    k_head: Tensor


@dataclass(frozen=True)
class Replay:
    """What one replay showed. `rows` covers the parameters that reach q or k, by their name in the module."""

    rows: dict[str, Rows]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: str | None
    rotary_dim: int
    rotary_start: int


Operands = tuple[Tensor, Tensor, Tensor]  # q, k, v, each (1, heads, tokens, channels)


def replay(call: Call, feeding: set[str], attentions: int, direct: bool) -> Replay:
    """Replay one call of a module on the CPU; its own tensors are back in place afterwards.

    Args:
        call: the call, with the arguments it had.
        feeding: the module's parameters that lead to q, k or v; no others get memory.
        attentions: how many times it attends.
        direct: whether all of them go through the attention function, so that the replay can stop at the last.
    """
    with materialised(call.module, feeding, Fill()) as params:

        def attend(mode: StraightThrough) -> list[Operands]:
            args, kwargs = inputs_like((call.args, call.kwargs), Fill(1))  # afresh: caches are written to
            with mode:
                return operands(call.module, args, kwargs, enough=attentions if direct else None)

        found = attend(StraightThrough())
        if len(found) != attentions:
            raise UnknownLayoutError(f"{call.name} attends {attentions} times in the model, {len(found)} times alone")
        reached = [_union([_reach(heads[i], params) for heads in found]) for i in range(3)]
        owners = {name: call.module.get_submodule(name.rpartition(".")[0]) for name in params}
        masks = {
            name: [by_name.get(name) or _none(param) for by_name in reached]
            for name, param in params.items()
            if name in reached[0] or name in reached[1]
        }
        dims = {name: output_dims(owners[name], by_role) for name, by_role in masks.items()}
        with _outputs(call.module) as outputs:
            q, k, _ = attend(FixedStatistics())[0]
        kv_of = distinct_heads(found[0][1])
        q_heads = _heads(q, list(range(q.shape[1])), params, {name: dims[name] for name in reached[0]})
        k_heads = _heads(k, kv_of, params, {name: dims[name] for name in reached[1]})
        rotary, rotary_dim, rotary_start = pairing(q, {name: head for name, (_, head) in q_heads.items()}, outputs)
        rows = {}
        for name, (usual, *_) in dims.items():
            shape = tuple(params[name].shape)
            dim = next((heads[name][0] for heads in (q_heads, k_heads) if name in heads), usual)
            none = (dim, torch.full((shape[dim],), -1))
            alike = (heads.get(name, none) for heads in (q_heads, k_heads))
            heads = (head if of == dim else none[1] for of, head in alike)
            rows[name] = Rows(shape, dim, *(by_dim[dim] for by_dim in masks[name]), *heads)
    return Replay(rows, q.shape[1], max(kv_of) + 1, q.shape[-1], rotary, rotary_dim, rotary_start)


def operands(module: nn.Module, args: tuple, kwargs: dict, *, enough: int | None) -> list[Operands]:
    """Run a module on the CPU and return q, k and v of its attentions, with their graphs."""
    trace = Trace(module)
    trace.activate((args, kwargs))
    with watching(trace, enough=enough) as seen:
        module(*args, **kwargs)
    return [_normal_form(trace, found) for found in seen]


def _normal_form(trace: Trace, found: Seen) -> Operands:
    """Operands as (1, heads, tokens, channels), whichever way round the model multiplies them.

    One slice of the scores along the softmax's axis belongs to one query and to all keys: its gradient says which
    operand is which.
    """
    q, k, v = (trace.tensors[key] for key in (found.query, found.key, found.value))
    if found.scores is None:
        return q, k, v
    scores = trace.tensors[found.scores]
    one_query = scores[tuple(slice(None) if d == found.dim % scores.dim() else -1 for d in range(scores.dim()))]
    lhs, rhs = torch.autograd.grad(one_query, (q, k), Fill(4).normal(one_query.shape), retain_graph=True)
    rows, columns = int((lhs != 0).any(-1).sum()), int((rhs != 0).any(-2).sum())
    if rows == 1 and columns > 1:
        return q[None], k.mT[None], v[None]
    if columns == 1 and rows > 1:
        return k.mT[None], q[None], v[None]
    raise UnknownLayoutError(f"a softmax over {tuple(scores.shape)} belongs to {rows} and {columns} tokens at once")


def _none(param: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(n, dtype=torch.bool) for n in param.shape)


def distinct_heads(key: Tensor) -> list[int]:
    """Key-value head of every key head as attended: equal heads, bit for bit, are copies of one (grouped queries)."""
    firsts: list[int] = []
    of: list[int] = []
    for head in range(key.shape[1]):
        same = next((i for i, first in enumerate(firsts) if torch.equal(key[:, first], key[:, head])), None)
        if same is None:
            firsts.append(head)
            same = len(firsts) - 1
        of.append(same)
    return of


def _reach(target: Tensor, params: dict[str, nn.Parameter]) -> dict[str, tuple[Tensor, ...]]:
    """Per parameter and dimension, the slices with a non-zero gradient of a random projection of `target`."""
    out: dict[str, tuple[Tensor, ...]] = {}
    for name, grad in _gradients(target, Fill(2).normal(target.shape), params).items():
        if not bool(grad.sum().isfinite()):
            raise UnknownLayoutError(f"{name}: the gradient of a replay is not finite")
        hit = grad != 0
        if bool(hit.any()):
            out[name] = tuple(
                hit.movedim(dim, 0).flatten(1).any(1) if hit.dim() > 1 else hit for dim in range(hit.dim())
            )
    return out


def _union(found: list[dict[str, tuple[Tensor, ...]]]) -> dict[str, tuple[Tensor, ...]]:
    out: dict[str, tuple[Tensor, ...]] = {}
    for masks in found:
        for name, by_dim in masks.items():
            out[name] = tuple(a | b for a, b in zip(out.get(name, by_dim), by_dim, strict=True))
    return out


def _heads(
    target: Tensor, head_of: list[int], params: dict[str, nn.Parameter], dims: dict[str, list[int]]
) -> dict[str, tuple[int, Tensor]]:
    """Per parameter in `dims`: a dimension, and the one head that each slice along it feeds, or -1.

    Of the possible dimensions, the first along which slices feed single heads, else the first.

    The gradient is linear in what is fed back. Fed back once as it is and once with head h multiplied by h + 1, a
    slice that feeds one head alone comes out multiplied by exactly that number, in all its elements.
    """
    first_copies = torch.tensor([head not in head_of[:i] for i, head in enumerate(head_of)]).view(1, -1, 1, 1)
    code = torch.tensor(head_of, dtype=torch.float32).view(1, -1, 1, 1) + 1
    fill = Fill(3)
    out: dict[str, tuple[int, Tensor]] = {}
    # A slice of a matrix has many elements to compare; a vector's one element needs several random tries.
    for matrices, tries in ((True, 1), (False, 4)):
        only = {name: params[name] for name in dims if (params[name].dim() > 1) == matrices}
        samples: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}
        for _ in range(tries):
            back = fill.normal(target.shape) * first_copies
            for side, fed in enumerate((back, back * code)):
                for name, grad in _gradients(target, fed, only).items():
                    for dim in dims[name]:
                        samples.setdefault((name, dim), ([], []))[side].append(_sample(grad, dim))
        for (name, dim), (plain, coded) in samples.items():
            head = _decode(torch.cat(plain, 1), torch.cat(coded, 1), max(head_of) + 1)
            if name not in out or (bool((head >= 0).any()) and not bool((out[name][1] >= 0).any())):
                out[name] = dim, head
    return out


def _sample(grad: Tensor, dim: int) -> Tensor:
    """(slices along `dim`, some of their elements), in float64: enough to tell a common factor."""
    if grad.dim() == 1:
        return grad[:, None].double()
    slices = grad.movedim(dim, 0).flatten(1)
    return slices[:, :: max(1, slices.shape[1] // 128)].double()


def _decode(plain: Tensor, coded: Tensor, heads: int) -> Tensor:
    """Head whose code every row of `plain` was multiplied by to give `coded`; -1 where no one number explains it."""
    aa, ab, bb = (plain * plain).sum(1), (plain * coded).sum(1), (coded * coded).sum(1)
    ratio = ab / aa
    head = ratio.round()
    single = (aa > 0) & (ab * ab >= (1 - 1e-5) * aa * bb) & ((ratio - head).abs() < 1e-3)
    single &= (head >= 1) & (head <= heads)
    return torch.where(single, head - 1, torch.full_like(head, -1)).long()


def _gradients(target: Tensor, back: Tensor, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    if not target.requires_grad or not params:
        return {}
    grads = torch.autograd.grad(target, list(params.values()), back, retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}


@contextlib.contextmanager
def _outputs(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Outputs of the submodules while the block runs, by parameter: what each projection's rows came out as."""
    outputs: dict[str, Tensor] = {}

    def keep(prefix: str) -> Any:
        def hook(owner: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.update({f"{prefix}.{key}": output for key in owner._parameters})

        return hook

    handles = [sub.register_forward_hook(keep(name)) for name, sub in module.named_modules() if name]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
