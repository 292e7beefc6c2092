"""Run one attention module with random weights and inputs, and see by gradients which rows make q, k and v.

Only one module per distinct signature is ever given memory, and of it only the parameters that reach q, k or v.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qkguard.errors import UnknownLayoutError
from qkguard.layout.capture import Capture, attention_function

SEED = 20_260_731
PERIOD = 65_521  # prime: rows of a filled weight never line up


class _Reached(Exception):
    """Raised by the attention function: what comes after q, k and v does not matter."""


class Fill:
    """Deterministic random tensors from one private generator; big ones repeat a block of prime length."""

    def __init__(self, seed: int = SEED):
        generator = torch.Generator().manual_seed(seed)
        self.block = torch.randn(PERIOD, generator=generator)
        self.offset = 0

    def normal(self, shape: torch.Size | tuple[int, ...], scale: float = 1.0) -> Tensor:
        count = torch.Size(shape).numel()
        self.offset = (self.offset + 7_919) % PERIOD
        block = self.block.roll(self.offset) * scale
        return block.repeat(-(-count // PERIOD))[:count].view(shape)

    def like(self, tensor: Tensor) -> Tensor:
        """A random CPU stand-in for a meta input: floats around zero in float32, integers as positions, masks open."""
        if tensor.is_floating_point():
            return self.normal(tensor.shape)
        if tensor.is_complex():
            return torch.complex(self.normal(tensor.shape), self.normal(tensor.shape))
        if tensor.dtype is torch.bool:
            return torch.ones(tensor.shape, dtype=torch.bool)
        length = tensor.shape[-1] if tensor.dim() else 1
        return torch.arange(length).expand(tensor.shape).to(tensor.dtype).clone()


@dataclass(frozen=True)
class Touched:
    """For one parameter and one dimension: which slices feed q, k and v, and which single head they feed (-1: several)."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_head: Tensor
    k_head: Tensor


@dataclass(frozen=True)
class Replay:
    """What one replay showed. `touched[name][dim]` covers the parameters that reach q or k."""

    shapes: dict[str, tuple[int, ...]]
    touched: dict[str, tuple[Touched, ...]]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: str | None
    rotary_dim: int


def replay(capture: Capture) -> Replay:
    """Replay a capture's module on the CPU. The module's own (meta) parameters are back in place afterwards."""
    module = capture.call.module
    feeding = _feeding(capture)
    with _materialised(module, feeding, Fill()) as params:
        fill = Fill(SEED + 1)
        args, kwargs = _real((capture.call.args, capture.call.kwargs), fill)
        q, k, v = _query_key_value(module, args, kwargs)
        kv_of = _distinct_heads(k)
        reach = {role: _reach(tensor, params) for role, tensor in (("q", q), ("k", k), ("v", v))}
        with FixedStatistics(), _outputs(module) as outputs:
            q, k, _ = _query_key_value(module, args, kwargs)
        q_heads = _heads(q, list(range(q.shape[1])), params, reach["q"])
        k_heads = _heads(k, kv_of, params, reach["k"])
        touched = {}
        for name, param in params.items():
            if name in reach["q"] or name in reach["k"]:
                none = tuple(torch.zeros(n, dtype=torch.bool) for n in param.shape)
                several = tuple(torch.full((n,), -1) for n in param.shape)
                touched[name] = tuple(
                    Touched(*rows)
                    for rows in zip(
                        *(reach[role].get(name, none) for role in "qkv"),
                        q_heads.get(name, several),
                        k_heads.get(name, several),
                        strict=True,
                    )
                )
        shapes = {name: tuple(param.shape) for name, param in params.items()}
        rotary, rotary_dim = _rotary(q, q_heads, outputs)
    return Replay(shapes, touched, q.shape[1], max(kv_of) + 1, q.shape[-1], rotary, rotary_dim)


def _query_key_value(module: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor]:
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> None:
        found.append((query, key, value))
        raise _Reached

    with attention_function(attend), contextlib.suppress(_Reached):
        module(*args, **kwargs)
    if not found:
        raise UnknownLayoutError(f"{type(module).__name__} attended in the whole model but not when replayed alone")
    return found[0]


def _feeding(capture: Capture) -> set[str]:
    """Names of the module's parameters with a path to q, k or v, read off the autograd graph on meta."""
    module = capture.call.module
    args, kwargs = _detached((capture.call.args, capture.call.kwargs))
    named = dict(module.named_parameters())
    found = set()
    for tensor in _query_key_value(module, args, kwargs):
        if tensor.requires_grad:
            grads = torch.autograd.grad(tensor.sum(), list(named.values()), allow_unused=True, retain_graph=True)
            found |= {name for name, grad in zip(named, grads, strict=True) if grad is not None}
    return found


@contextlib.contextmanager
def _materialised(module: nn.Module, feeding: set[str], fill: Fill) -> Iterator[dict[str, nn.Parameter]]:
    """Give the module CPU tensors in place of meta ones: random where they feed q, k or v, else one repeated number."""
    originals: list[tuple[dict, str, Any]] = []
    params: dict[str, nn.Parameter] = {}
    made: dict[int, nn.Parameter] = {}
    try:
        for prefix, owner in module.named_modules(remove_duplicate=False):
            for key, param in owner._parameters.items():
                if param is None:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                if id(param) not in made:
                    made[id(param)] = _parameter(param, name in feeding, fill)
                    if name in feeding:
                        params[name] = made[id(param)]
                originals.append((owner._parameters, key, param))
            for key, buffer in owner._buffers.items():
                if buffer is not None:
                    originals.append((owner._buffers, key, buffer))
        for holder, key, tensor in originals:
            holder[key] = made[id(tensor)] if id(tensor) in made else fill.like(tensor)
        yield params
    finally:
        for holder, key, tensor in originals:
            holder[key] = tensor


def _parameter(param: Tensor, feeds: bool, fill: Fill) -> nn.Parameter:
    if not feeds:
        return nn.Parameter(torch.full((1,) * param.dim(), 0.5).expand(param.shape), requires_grad=False)
    if param.dim() < 2:
        return nn.Parameter(1 + 0.1 * fill.normal(param.shape))
    return nn.Parameter(fill.normal(param.shape, max(param.shape) ** -0.5))


def _map_tensors(value: Any, change: Any) -> Any:
    """A nested structure of lists, tuples and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    return value


def _detached(value: Any) -> Any:
    return _map_tensors(value, lambda tensor: tensor.detach())


def _real(value: Any, fill: Fill) -> Any:
    """CPU stand-ins for meta tensors; one tensor passed twice stays one tensor."""
    made: dict[int, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = fill.like(tensor)
        return made[id(tensor)]

    return _map_tensors(value, change)


def _distinct_heads(key: Tensor) -> list[int]:
    """Key-value head of every key head as attended: equal heads, bit for bit, are copies of one (grouped queries)."""
    of: list[int] = []
    firsts: list[int] = []
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
    for name, grad in _gradients(target, Fill(SEED + 2).normal(target.shape), params).items():
        if not bool(torch.isfinite(grad).all()):
            raise UnknownLayoutError(f"{name}: the gradient of a replay is not finite")
        hit = grad != 0
        out[name] = tuple(
            hit.movedim(dim, 0).flatten(1).any(1) if grad.dim() > 1 else hit for dim in range(grad.dim())
        )
    return {name: masks for name, masks in out.items() if bool(masks[0].any())}


def _heads(
    target: Tensor, head_of: list[int], params: dict[str, nn.Parameter], reached: dict[str, Any]
) -> dict[str, tuple[Tensor, ...]]:
    """Per parameter and dimension, the one head that each slice feeds, or -1.

    The gradient is linear in what is fed back. Fed back once as it is and once with head h multiplied by h + 1, a
    slice that feeds one head alone comes out multiplied by exactly that number, in all its elements.
    """
    firsts = torch.tensor([head not in head_of[:i] for i, head in enumerate(head_of)]).view(1, -1, 1, 1)
    back = Fill(SEED + 3).normal(target.shape) * firsts
    code = torch.tensor(head_of, dtype=torch.float32).view(1, -1, 1, 1) + 1
    only = {name: param for name, param in params.items() if name in reached}
    plain = _gradients(target, back, only)
    coded = _gradients(target, back * code, only)
    out = {}
    for name in plain.keys() & coded.keys():
        out[name] = tuple(
            _decode(plain[name].movedim(dim, 0), coded[name].movedim(dim, 0), max(head_of) + 1)
            for dim in range(plain[name].dim())
        )
    return out


def _decode(plain: Tensor, coded: Tensor, heads: int) -> Tensor:
    """Head whose code every slice along dimension 0 was multiplied by; -1 where no one number explains the slice."""
    a, b = (
        plain.flatten(1) if plain.dim() > 1 else plain[:, None],
        coded.flatten(1) if coded.dim() > 1 else coded[:, None],
    )
    aa, ab, bb = (a * a).sum(1).double(), (a * b).sum(1).double(), (b * b).sum(1).double()
    ratio = ab / aa
    head = ratio.round()
    single = (
        (aa > 0) & (ab * ab >= (1 - 1e-5) * aa * bb) & ((ratio - head).abs() < 1e-3) & (head >= 1) & (head <= heads)
    )
    if plain.dim() == 1 and not bool((single | (aa == 0)).all()):
        single = torch.zeros_like(
            single
        )  # one number per slice proves little: all of a vector's entries decode, or none
    return torch.where(single, head - 1, torch.full_like(head, -1)).long()


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


def _rotary(query: Tensor, heads: dict[str, tuple[Tensor, ...]], outputs: dict[str, Tensor]) -> tuple[str | None, int]:
    """How positions enter the first query head: ("half" | "interleaved" | "none", rotated channels), or (None, 0).

    A rotation makes each channel of the query from two rows of the projection; which two tells the pairing.
    """
    for name, by_dim in heads.items():
        output = outputs.get(name)
        if output is None or len(by_dim) != 2:
            continue
        of_head = max((by_dim[0] == 0, by_dim[1] == 0), key=lambda mask: int(mask.sum()))
        rows = of_head.nonzero().flatten().tolist()
        if len(rows) != query.shape[-1] or output.shape[-1] != len(of_head):
            continue
        made_of = []
        for channel in query[0, 0, -1]:
            (grad,) = torch.autograd.grad(channel, output, retain_graph=True)
            made_of.append(grad.reshape(-1, grad.shape[-1])[-1, rows].nonzero().flatten().tolist())
        return _pairing(made_of)
    return None, 0


def _pairing(made_of: list[list[int]]) -> tuple[str | None, int]:
    """Per channel the rows that it is made of -> pairing and number of rotated channels."""
    if any(len(rows) not in (1, 2) for rows in made_of):
        return None, 0
    pairs = sorted({tuple(rows) for rows in made_of if len(rows) == 2})
    if not pairs:
        return "none", 0
    if sorted(row for pair in pairs for row in pair) != list(range(pairs[0][0], pairs[0][0] + 2 * len(pairs))):
        return None, 0
    if all(b - a == len(pairs) for a, b in pairs):
        return "half", 2 * len(pairs)
    return ("interleaved", 2 * len(pairs)) if all(b - a == 1 for a, b in pairs) else (None, 0)


def _gradients(target: Tensor, back: Tensor, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    if not target.requires_grad:
        return {}
    grads = torch.autograd.grad(
        target, list(params.values()), back.to(target.dtype), retain_graph=True, allow_unused=True
    )
    return {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}


class FixedStatistics(TorchFunctionMode):
    """Treats means, variances and norms as constants of the graph.

    q/k normalisation ties every row to every other one of its group through the statistics; with them held fixed, a
    row reaches only the channels that it is multiplied into.
    """

    NAMES = frozenset({"mean", "var", "std", "rsqrt", "sqrt", "norm", "vector_norm", "max", "amax"})

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.NAMES:
            return _detached(func(*args, **kwargs))
        if name in ("rms_norm", "layer_norm"):
            return _fixed_norm(name, *args, **kwargs)
        return func(*args, **kwargs)


def _fixed_norm(
    name: str,
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    if name == "layer_norm":
        x = x - x.detach().mean(dims, keepdim=True)
    x = x * (x.detach().pow(2).mean(dims, keepdim=True) + (eps or 1e-6)).rsqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
