"""Run one attention module again on the CPU, with random weights and inputs, to see which rows make q, k and v."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qkguard.errors import UnknownLayoutError
from qkguard.layout import gradients
from qkguard.layout.capture import Attention, watching
from qkguard.layout.trace import Call, Trace
from qkguard.layout.weightless import Fill, inputs_like, map_tensors, materialised

Operands = tuple[Tensor, Tensor, Tensor]
"""q, k and v of one attention, each (1, heads, tokens, channels), float32, with their graphs."""


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


def replay(call: Call, names: set[str], attentions: list[Attention]) -> Replay:
    """Replay one call of a module on the CPU; its own tensors are back in place afterwards.

    Args:
        call: the call, with the arguments it had.
        names: the module's parameters that lead to q, k or v; no others get memory.
        attentions: where it attends.

    Raises:
        UnknownLayoutError: alone, the module attends more or less often.
    """
    enough = stop_after(attentions)
    with materialised(call.module, names, Fill()) as params:
        with StraightThrough():
            found = operands(call, enough)
        if len(found) != len(attentions):
            raise UnknownLayoutError(
                f"{call.name} attends {len(attentions)} times in the model, {len(found)} times alone"
            )
        with FixedStatistics(), _outputs(call.module) as outputs:
            q, k, _ = operands(call, enough)[0]
        masks = _masks(found, params)
        dims = {}
        for name, by_role in masks.items():
            dims[name] = gradients.output_dims(call.module.get_submodule(name.rpartition(".")[0]), by_role)
        kv_of = gradients.distinct_heads(found[0][1])
        q_dims = {name: dims[name] for name, (to_q, _, _) in masks.items() if to_q[0].any()}
        k_dims = {name: dims[name] for name, (_, to_k, _) in masks.items() if to_k[0].any()}
        q_heads = gradients.single_heads(q, list(range(q.shape[1])), params, q_dims)
        k_heads = gradients.single_heads(k, kv_of, params, k_dims)
        by_head = {name: head for name, (_, head) in q_heads.items()}
        rotary, rotary_dim, rotary_start = gradients.rotary_pairing(q, by_head, outputs)
        rows = {}
        for name, by_role in masks.items():
            known = q_heads.get(name) or k_heads.get(name)
            dim = known[0] if known else dims[name][0]
            shape = tuple(params[name].shape)
            q_head, k_head = (_heads_along(dim, shape[dim], heads.get(name)) for heads in (q_heads, k_heads))
            q_rows, k_rows, v_rows = (by_dim[dim] for by_dim in by_role)
            rows[name] = Rows(shape, dim, q_rows, k_rows, v_rows, q_head, k_head)
    return Replay(rows, q.shape[1], max(kv_of) + 1, q.shape[-1], rotary, rotary_dim, rotary_start)


def stop_after(attentions: list[Attention]) -> int | None:
    """After how many attentions a replay may stop: all, if each is seen while it runs; None to run to the end."""
    return len(attentions) if all(attention.scores is None for attention in attentions) else None


def operands(call: Call, enough: int | None) -> list[Operands]:
    """Run a call's module on the CPU and return q, k and v of its attentions, with their graphs."""
    args, kwargs = inputs_like((call.args, call.kwargs), Fill(1))  # made afresh: caches among them are written to
    trace = Trace(call.module)
    trace.add_inputs((args, kwargs))
    with watching(trace, enough=enough) as attentions:
        call.module(*args, **kwargs)
    return [_normal_form(trace, attention) for attention in attentions]


def _normal_form(trace: Trace, attention: Attention) -> Operands:
    """Operands as (1, heads, tokens, channels), whichever way round the model multiplies them.

    One slice of the scores along the softmax's axis belongs to one query and to all keys: its gradient says which
    operand is which.
    """
    q, k, v = (trace.tensors[number] for number in (attention.query, attention.key, attention.value))
    if attention.scores is None:
        return q, k, v
    scores = trace.tensors[attention.scores]
    place: list[Any] = [-1] * scores.dim()
    place[attention.dim] = slice(None)
    one_query = scores[tuple(place)]
    lhs, rhs = torch.autograd.grad(one_query, (q, k), Fill(4).normal(one_query.shape), retain_graph=True)
    rows, columns = int((lhs != 0).any(-1).sum()), int((rhs != 0).any(-2).sum())
    if rows == 1 and columns > 1:
        return q[None], k.mT[None], v[None]
    if columns == 1 and rows > 1:
        return k.mT[None], q[None], v[None]
    raise UnknownLayoutError(f"A softmax over {tuple(scores.shape)} belongs to {rows} and {columns} tokens at once")


def _masks(found: list[Operands], params: gradients.Params) -> dict[str, tuple[gradients.Masks, ...]]:
    """Slices that reach q, k and v in any of the attentions, of the parameters that reach q or k."""
    q, k, v = (gradients.union([gradients.reach(one[i], params) for one in found]) for i in range(3))
    masks = {}
    for name, param in params.items():
        if name in q or name in k:
            nothing = tuple(torch.zeros(size, dtype=torch.bool) for size in param.shape)
            masks[name] = tuple(reached.get(name, nothing) for reached in (q, k, v))
    return masks


def _heads_along(dim: int, size: int, found: tuple[int, Tensor] | None) -> Tensor:
    """The heads of the `size` slices along `dim`; -1 throughout where another dimension, or none, has heads."""
    if found is not None and found[0] == dim:
        return found[1]
    return torch.full((size,), -1)


@contextlib.contextmanager
def _outputs(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Outputs of the submodules while the block runs, by parameter: what each projection's rows came out as."""
    outputs: dict[str, Tensor] = {}

    def keep(prefix: str, owner: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.update({f"{prefix}.{key}": output for key in owner._parameters})

    handles = []
    for name, submodule in module.named_modules():
        if name:
            handles.append(submodule.register_forward_hook(functools.partial(keep, name)))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class StraightThrough(TorchFunctionMode):
    """Lets gradients pass clipping, rectifying and rounding.

    Rows whose outputs happen to be clipped for every token (OLMo's and DBRX's `clip_qkv`) would else look unused.
    """

    CUTS = frozenset({"clamp", "clip", "clamp_min", "clamp_max", "hardtanh", "relu", "round", "floor", "ceil"})

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        x = args[0] if args else None
        if name.removesuffix("_") not in self.CUTS or not isinstance(x, Tensor) or not x.is_floating_point():
            return func(*args, **kwargs)
        if not name.endswith("_"):
            return x + (func(*args, **kwargs) - x).detach()
        return x.copy_(x + (func(x.detach().clone(), *args[1:], **kwargs) - x).detach())


class FixedStatistics(StraightThrough):
    """Also treats means, variances and norms as constants of the graph.

    q/k normalisation ties every row to every other one of its group through the statistics; with them held fixed, a
    row reaches only the channels that it is multiplied into.
    """

    STATISTICS = frozenset(
        {
            "mean", "var", "std", "rsqrt", "sqrt", "norm", "vector_norm", "linalg_norm", "linalg_vector_norm", "max",
            "amax",
        }
    )  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.STATISTICS:
            return map_tensors(func(*args, **kwargs), Tensor.detach)
        if name in ("rms_norm", "layer_norm"):
            return _fixed_norm(name, *args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)


def _fixed_norm(
    name: str,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    if name == "layer_norm":
        x = x - x.detach().mean(dims, keepdim=True)
    x = x * (x.detach().pow(2).mean(dims, keepdim=True) + (eps or 1e-6)).rsqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
