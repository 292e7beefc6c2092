"""Everything a forward pass does, as a graph of tensor operations: who made what, inside which module's call.

The graph is taken below autograd, where every model speaks the same few dozen operations, and serves three questions:
which softmax is attention (its input leads back to a product of two activations), which parameters lead to a tensor,
and whether two calls of two modules are the same program.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qkguard.layout.materialise import map_tensors
from qkguard.layout.weightless import STAND_INS

SOFTMAX = frozenset({"_softmax", "_safe_softmax"})
PRODUCT = frozenset({"bmm", "baddbmm", "mm", "addmm", "convolution", "_grouped_mm"})
# What may lie between scores and their softmax, or between probabilities and their product with the values.
BETWEEN = frozenset(
    {
        "view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "expand", "permute", "transpose",
        "t", "unsqueeze", "squeeze", "alias", "detach", "clone", "_to_copy", "slice", "select", "split",
        "split_with_sizes", "unbind", "cat", "stack", "constant_pad_nd", "masked_fill", "masked_fill_",
        "where", "add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "tanh", "clamp",
        "clamp_min", "maximum", "minimum", "index", "index_select", "gather", "copy_", "slice_scatter",
        "select_scatter", "native_dropout", "lift_fresh",
    }
)  # fmt: skip


@dataclass(eq=False)
class Call:
    """One call of one module. `start` is the number of operations before it."""

    module: nn.Module
    name: str
    parent: Call | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: int
    end: int = -1

    @property
    def chain(self) -> Iterator[Call]:
        """This call and the ones around it, innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: name, keys of the tensors it read and made, its other arguments, and the call it ran in."""

    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: tuple[Any, ...]
    call: Call | None


class Trace(TorchDispatchMode):
    """Records operations while active. Tensors get integer keys; writing in place makes a new key.

    On meta, operations that ask for values run their stand-ins (`weightless`).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.tensors: list[Tensor] = []  # by key; keeps them alive, so that ids stay unique
        self.calls: list[Call] = []
        self.active: set[int] = set()  # keys that depend on the model's input
        self.made_by: dict[int, int] = {}
        self._keys: dict[int, int] = {}
        self._shapes: dict[Any, Any] = {}
        self._model = model
        self.parameters = {self.key(param): name for name, param in model.named_parameters()}

    def key(self, tensor: Tensor) -> int:
        found = self._keys.get(id(tensor))
        return self._new_key(tensor) if found is None else found

    def _new_key(self, tensor: Tensor) -> int:
        self._keys[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def activate(self, inputs: Any) -> None:
        """Count every tensor in a structure of lists, tuples and dicts as an input of the model."""
        if isinstance(inputs, Tensor):
            self.active.add(self.key(inputs))
        elif isinstance(inputs, dict):
            self.activate(list(inputs.values()))
        elif isinstance(inputs, list | tuple):
            for item in inputs:
                self.activate(item)

    @property
    def call(self) -> Call | None:
        """The call in progress."""
        return self.calls[-1] if self.calls else None

    @contextlib.contextmanager
    def recording(self) -> Iterator[Trace]:
        """Record operations and module calls; the hooks are gone afterwards."""
        handles = []
        try:
            for name, module in self._model.named_modules():
                handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave))
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()
            self.calls.clear()

    def _enter(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            # A snapshot: caches and shared key-value stores are written to later on.
            args, kwargs = map_tensors((args, kwargs), lambda tensor: tensor)
            self.calls.append(Call(module, name, self.call, args, kwargs, len(self.nodes)))

        return hook

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.calls.pop().end = len(self.nodes)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        op = _name(func)
        read: list[Tensor] = []
        constants: list[Any] = []
        _sort(args, read, constants)
        _sort(tuple(kwargs.items()), read, constants)
        inputs = tuple(self.key(tensor) for tensor in read)
        if read and read[0].is_meta and op in STAND_INS:
            out = STAND_INS[op](*args, **kwargs)
        else:
            out = self._run(func, read, constants, args, kwargs)
        made: list[Tensor] = []
        _sort(out if isinstance(out, list | tuple) else (out,), made, [])
        self._record(op, inputs, made, tuple(constants))
        if read and any(tensor is read[0] for tensor in made) and read[0]._is_view() and read[0]._base is not None:
            base = read[0]._base  # a view was written to: so was what it looks into
            self._record("write_view", (self.key(base), self.key(read[0])), [base], ())
        return out

    def _run(self, func: Any, read: list[Tensor], constants: list[Any], args: tuple, kwargs: dict) -> Any:
        """The operation itself; on meta, where only shapes come out, from what the same shapes gave before."""
        if not read or not _makes_new_tensor(func) or not all(tensor.is_meta for tensor in read):
            return func(*args, **kwargs)
        key = (func, *((t.dtype, t.shape, t.stride()) for t in read), *constants)
        known = self._shapes.get(key)
        if known is None:
            out = func(*args, **kwargs)
            self._shapes[key] = (out.shape, out.stride(), out.dtype)
            return out
        return torch.empty_strided(known[0], known[1], dtype=known[2], device="meta")

    def _record(self, op: str, inputs: tuple[int, ...], made: list[Tensor], constants: tuple) -> None:
        outputs = tuple(self._new_key(tensor) for tensor in made)
        for key in outputs:
            self.made_by[key] = len(self.nodes)
        if any(key in self.active for key in inputs):
            self.active.update(outputs)
        self.nodes.append(Node(op, inputs, outputs, constants, self.call))

    def reaching(self, key: int, start: int) -> set[str]:
        """Names of the parameters that lead to a tensor through operations from number `start` on."""
        found, todo, seen = set(), [key], {key}
        while todo:
            key = todo.pop()
            if key in self.parameters:
                found.add(self.parameters[key])
            made_by = self.made_by.get(key, -1)
            if made_by >= start:
                fresh = [i for i in self.nodes[made_by].inputs if i not in seen]
                seen.update(fresh)
                todo.extend(fresh)
        return found

    def use(self, name: str) -> str:
        """How a parameter meets the activations: "weight" (in a product), "bias" (added) or "norm" (scaling)."""
        todo = [key for key, known in self.parameters.items() if known == name]
        seen, uses = set(todo), set()
        while todo:
            key = todo.pop()
            for node in self.readers.get(key, []):
                if not any(i in self.active for i in node.inputs):  # parameters among themselves: views, 1 + gain
                    todo += [o for o in node.outputs if o not in seen]
                    seen.update(node.outputs)
                elif node.op in PRODUCT:
                    added = node.op in ("addmm", "baddbmm") and node.inputs[0] == key
                    uses.add("bias" if added or (node.inputs[2:] == (key,) and node.op == "convolution") else "weight")
                else:
                    uses.add("bias" if node.op in ("add", "add_", "sub") else "norm")
        return next((use for use in ("weight", "bias", "norm") if use in uses), "norm")

    @functools.cached_property
    def readers(self) -> dict[int, list[Node]]:
        """Operations by the tensors they read, in order; to be asked for once the recording is over."""
        readers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for key in dict.fromkeys(node.inputs):
                readers.setdefault(key, []).append(node)
        return readers

    def program(self, call: Call) -> tuple:
        """Operations of a call in a form that is equal for calls that do the same thing."""
        prefix = f"{call.name}." if call.name else ""
        numbers: dict[int, Any] = {}

        def number(key: int) -> Any:
            if key not in numbers:
                tensor = self.tensors[key]
                name = self.parameters.get(key)
                numbers[key] = (
                    len(numbers),
                    None if name is None else name.removeprefix(prefix),
                    tuple(tensor.shape),
                    str(tensor.dtype),
                )
            return numbers[key]

        return tuple(
            (node.op, tuple(map(number, node.inputs)), tuple(map(number, node.outputs)), node.constants)
            for node in self.nodes[call.start : call.end]
        )


@functools.cache
def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


@functools.cache
def _makes_new_tensor(func: Any) -> bool:
    """Whether an operation returns one tensor that shares no memory with its arguments."""
    returns = func._schema.returns
    return (
        len(returns) == 1
        and str(returns[0].type) == "Tensor"
        and not any(a.alias_info for a in func._schema.arguments)
    )


def _sort(values: Any, tensors: list[Tensor], constants: list[Any]) -> None:
    """Tensors of a flat or once-nested argument list to the one side, hashable forms of the rest to the other."""
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            constants.append("tensor")
        elif isinstance(value, list | tuple):
            constants.append(len(value))
            _sort(value, tensors, constants)
        elif isinstance(value, float) and value and math.isfinite(value):
            constants.append("number")  # a scale changes no map
        else:
            constants.append(value)
