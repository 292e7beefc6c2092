"""The values and the output projection of attention layers, found by what they do: for the sweep's controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.errors import QKGuardError, first_line
from qkguard.layout.spec import AttentionSpec, Block, ParamMap, true_ranges
from qkguard.probe.attention import AttentionCall, watch_attention
from qkguard.probe.passes import input_device, undisturbed

TOKENS = 8  # of the pass that finds them: a few, so that positions attend to one another


def find_value_output(
    model: nn.Module, specs: Sequence[AttentionSpec], which: str
) -> list[tuple[AttentionSpec, ParamMap]]:
    """The parameters (or rows of fused ones) that make nothing but values ("v"), or the output projection ("o").

    One forward pass of a few tokens with gradients: rows of a layer's own parameters on which its values depend, but
    not its queries and keys, are V; the module whose output is the layer's output is O. The model is left as it was.

    Raises:
        QKGuardError: attention that does not go through transformers' AttentionInterface, or a layer without such
            parameters (keys and values from one projection).
    """
    out = []
    with _watched(model, [spec.module for spec in specs]) as seen:
        for spec in specs:
            calls = seen.get(spec.module)
            if calls is None or "q" not in calls:
                raise QKGuardError(
                    f"The attention of {spec.module} does not go through transformers' AttentionInterface, so its "
                    f"{which.upper()} cannot be told from its other parameters. Leave out the controls v, o and vo."
                )
            found = _values(model, spec, calls) if which == "v" else _outputs(model, spec, calls)
            if not found:
                raise QKGuardError(
                    f"{spec.module} has no parameter of its own for {which.upper()} alone. Leave out that control."
                )
            out += [(spec, param) for param in found]
    return out


def value_output_by_layer(model: nn.Module, specs: Sequence[AttentionSpec]) -> list[dict[str, list[ParamMap]]]:
    """`find_value_output` of both ("v", "o"), layer by layer; an empty list where it cannot be told."""
    out: list[dict[str, list[ParamMap]]] = [{"v": [], "o": []} for _ in specs]
    try:
        with _watched(model, [spec.module for spec in specs]) as seen:
            for spec, found in zip(specs, out, strict=True):
                calls = seen.get(spec.module)
                if calls is not None and "q" in calls:
                    found |= {"v": _values(model, spec, calls), "o": _outputs(model, spec, calls)}
    except QKGuardError:
        pass  # a model that does not run on bare tokens
    return out


def _values(model: nn.Module, spec: AttentionSpec, calls: dict[str, Tensor]) -> list[ParamMap]:
    known = {p.name: p for p in spec.params}
    params = {n: p for n, p in model.named_parameters() if n.startswith(f"{spec.module}.") or n in known}
    touched = {role: _gradients(calls[role], params) for role in "qkv"}
    out = []
    for name, param in params.items():
        dim = known[name].dim if name in known else 0
        reached = {
            role: (grads[name] != 0).transpose(0, dim).reshape(param.shape[dim], -1).any(1).cpu()
            for role, grads in touched.items()
            if name in grads
        }
        rows = reached.get("v", torch.zeros(param.shape[dim], dtype=torch.bool))
        for role in "qk":
            if role in reached:
                rows = rows & ~reached[role]
        blocks = tuple(Block(start, stop, "v") for start, stop in true_ranges(rows))
        if blocks:
            out.append(ParamMap(name, tuple(param.shape), dim, "bias" if param.dim() == 1 else "weight", blocks))
    return out


def _outputs(model: nn.Module, spec: AttentionSpec, calls: dict[str, Any]) -> list[ParamMap]:
    owner = calls.get("last")
    if owner is None:
        return []
    prefix = next(name for name, module in model.named_modules() if module is owner)
    return [
        ParamMap(f"{prefix}.{n}", tuple(p.shape), 0, "bias" if p.dim() == 1 else "weight", (Block(0, len(p), "v"),))
        for n, p in owner.named_parameters(recurse=False)
    ]


def _gradients(tensor: Tensor, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Of a random projection of a tensor, with respect to the parameters that it depends on."""
    random = torch.Generator().manual_seed(0)
    back = torch.randn(tensor.shape, generator=random).to(tensor)
    grads = torch.autograd.grad(tensor, list(params.values()), back, retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}


class _FirstCalls:
    """Keeps query, key and value (with their graphs) of the first attention inside each module that runs."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, Any]] = {}
        self.inside: list[str] = []

    def keep(self, call: AttentionCall) -> None:
        if self.inside:
            seen = self.seen.setdefault(self.inside[-1], {})
            if not ("q" in seen and seen["q"].requires_grad):  # models that iterate run the first passes without
                seen |= {"q": call.query, "k": call.key, "v": call.value}


@contextmanager
def _watched(model: nn.Module, modules: Sequence[str]) -> Iterator[dict[str, dict[str, Any]]]:
    """Module name -> its query, key and value (with their graphs) and the module that made its output, of one pass."""
    calls = _FirstCalls()
    names = {id(model.get_submodule(name)): name for name in modules}
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensors are kept, so that no other one gets their id

    def enter(module: nn.Module, args: Any) -> None:
        calls.inside.append(names[id(module)])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if id(first) in made:
            calls.seen.setdefault(calls.inside[-1], {})["last"] = made[id(first)][0]
        calls.inside.pop()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if calls.inside and isinstance(output, Tensor):
            made[id(output)] = module, output

    hooks = [m.register_forward_pre_hook(enter) for m in model.modules() if id(m) in names]
    hooks += [m.register_forward_hook(leave) for m in model.modules() if id(m) in names]
    hooks += [m.register_forward_hook(note) for m in model.modules() if m._parameters]  # dropout passes on
    grads = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with undisturbed(model), torch.enable_grad(), watch_attention(model, calls.keep):
            for param, _ in grads:
                param.requires_grad_(param.is_floating_point())
            ids = torch.arange(1, TOKENS + 1, device=input_device(model))[None]
            try:
                model(input_ids=ids, use_cache=False)
            except Exception as error:
                raise QKGuardError(
                    f"{type(model).__name__} does not run on a few bare tokens ({first_line(error)}), so its V and O "
                    "cannot be found. Leave out the controls v, o and vo."
                ) from error
        yield calls.seen
    finally:
        for hook in hooks:
            hook.remove()
        for param, wanted in grads:
            param.requires_grad_(wanted)
