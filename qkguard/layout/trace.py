"""Everything a forward pass does, as a graph of tensor operations: who made what, inside which module's call.

The graph is recorded below autograd (TorchDispatchMode), where every model speaks the same few dozen operations. It
answers three questions: which softmax is attention (its input leads back to a product of two activations), which
parameters lead to a tensor, and whether two calls of two modules are the same program.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# A private module: torch (checked with 2.11 to 2.13) has no public way to watch operations below autograd.
from torch.utils._python_dispatch import TorchDispatchMode

from qkguard.layout.weightless import STAND_INS, map_tensors

SOFTMAX = frozenset({"_softmax", "_safe_softmax"})
PRODUCT = frozenset({"bmm", "baddbmm", "mm", "addmm", "convolution", "_grouped_mm"})
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
"""What may lie between scores and their softmax, or between probabilities and their product with the values."""


@dataclass(eq=False)
class Call:
    """One call of one module. Its operations are `start:end` of the trace."""

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
class Operation:
    """Its name, the numbers of the tensors it read and made, its other arguments, and the call it ran in."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: tuple[Any, ...]
    call: Call | None


def walk(start: Iterable[int], neighbours: Callable[[int], Iterable[int]]) -> Iterator[int]:
    """Tensor numbers that `neighbours` leads to, nearest first, `start` included, each once."""
    todo = deque(start)
    seen = set(todo)
    while todo:
        number = todo.popleft()
        yield number
        for other in neighbours(number):
            if other not in seen:
                seen.add(other)
                todo.append(other)


class Trace(TorchDispatchMode):
    """Records operations while active. Tensors are numbered; writing into one gives it a new number."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.tensors: list[Tensor] = []  # by number; kept alive, so that no id is used twice
        self.activations: set[int] = set()  # tensors that depend on the model's input
        self.made_by: dict[int, int] = {}  # tensor -> index of the operation that made it
        self._numbers: dict[int, int] = {}  # id of a tensor -> its latest number
        self._calls: list[Call] = []  # in progress, outermost first
        self._model = model
        self.parameters = {self.number(param): name for name, param in model.named_parameters()}

    def number(self, tensor: Tensor) -> int:
        found = self._numbers.get(id(tensor))
        return self._new_number(tensor) if found is None else found

    def _new_number(self, tensor: Tensor) -> int:
        self._numbers[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def add_inputs(self, inputs: Any) -> None:
        """Every tensor in a structure of lists, tuples and dicts counts as an input of the model."""
        if isinstance(inputs, Tensor):
            self.activations.add(self.number(inputs))
        elif isinstance(inputs, dict):
            self.add_inputs(list(inputs.values()))
        elif isinstance(inputs, list | tuple):
            for item in inputs:
                self.add_inputs(item)

    @property
    def call(self) -> Call | None:
        """The innermost call in progress."""
        return self._calls[-1] if self._calls else None

    @contextlib.contextmanager
    def recording(self) -> Iterator[Trace]:
        """Record operations and module calls; the hooks are gone afterwards."""
        handles = []
        try:
            for name, module in self._model.named_modules():
                enter = functools.partial(self._enter, name)
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave))
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()
            self._calls.clear()

    def _enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # The containers are copied: caches and shared key-value stores are written to later on.
        args, kwargs = map_tensors((args, kwargs), _itself)
        self._calls.append(Call(module, name, self.call, args, kwargs, len(self.operations)))

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._calls.pop().end = len(self.operations)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        leaves = [*_leaves(args), *_leaves(tuple(kwargs.items()))]
        read = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = tuple(map(self.number, read))  # before it runs: it may write into them
        if read and read[0].is_meta and name in STAND_INS:
            out = STAND_INS[name](*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        made = [leaf for leaf in _leaves((out,)) if isinstance(leaf, Tensor)]
        self._record(name, inputs, made, tuple(map(_constant, leaves)))
        if read and any(tensor is read[0] for tensor in made) and read[0]._is_view() and read[0]._base is not None:
            base = read[0]._base  # a view was written into, and so was the tensor that it views
            self._record("write_view", (self.number(base), self.number(read[0])), [base], ())
        return out

    def _record(self, name: str, inputs: tuple[int, ...], made: list[Tensor], constants: tuple) -> None:
        outputs = tuple(map(self._new_number, made))
        self.made_by.update(dict.fromkeys(outputs, len(self.operations)))
        if not self.activations.isdisjoint(inputs):
            self.activations.update(outputs)
        self.operations.append(Operation(name, inputs, outputs, constants, self.call))

    @functools.cached_property
    def readers(self) -> dict[int, list[Operation]]:
        """Operations by the tensors they read, in order; to be asked for once the recording is over."""
        readers: dict[int, list[Operation]] = {}
        for operation in self.operations:
            for number in dict.fromkeys(operation.inputs):
                readers.setdefault(number, []).append(operation)
        return readers

    def maker(self, number: int) -> Operation | None:
        """The operation that made a tensor; None for inputs, parameters and buffers."""
        return self.operations[self.made_by[number]] if number in self.made_by else None

    def reaching(self, number: int, start: int) -> set[str]:
        """Names of the parameters that lead to a tensor through the operations from index `start` on."""

        def inputs(number: int) -> tuple[int, ...]:
            index = self.made_by.get(number, -1)
            return self.operations[index].inputs if index >= start else ()

        return {self.parameters[found] for found in walk([number], inputs) if found in self.parameters}

    def kind(self, name: str) -> str:
        """How a parameter meets the activations: "weight" (in a product), "bias" (added) or "norm" (scaling)."""
        uses: set[str] = set()

        def derived(number: int) -> Iterator[int]:
            """What is made from a parameter and other parameters alone: views, 1 + gain."""
            for operation in self.readers.get(number, []):
                if self.activations.isdisjoint(operation.inputs):
                    yield from operation.outputs
                else:
                    uses.add(_use(operation, number))

        own = [number for number, known in self.parameters.items() if known == name]
        deque(walk(own, derived), maxlen=0)
        return next((use for use in ("weight", "bias", "norm") if use in uses), "norm")

    def program(self, call: Call) -> tuple:
        """Operations of a call in a form that is equal for calls that do the same thing."""
        prefix = f"{call.name}." if call.name else ""
        forms: dict[int, Any] = {}

        def form(number: int) -> Any:
            """A tensor by the order in which the call meets it, its name in the module, its shape and dtype."""
            if number not in forms:
                tensor, name = self.tensors[number], self.parameters.get(number)
                local = None if name is None else name.removeprefix(prefix)
                forms[number] = len(forms), local, tuple(tensor.shape), str(tensor.dtype)
            return forms[number]

        return tuple(
            (op.name, tuple(map(form, op.inputs)), tuple(map(form, op.outputs)), op.constants)
            for op in self.operations[call.start : call.end]
        )


def _use(operation: Operation, number: int) -> str:
    """What an operation that reads activations does with another tensor that it reads."""
    if operation.name not in PRODUCT:
        return "bias" if operation.name in ("add", "add_", "sub") else "norm"
    added_first = operation.name in ("addmm", "baddbmm") and operation.inputs[0] == number
    convolution_bias = operation.name == "convolution" and operation.inputs[2:] == (number,)
    return "bias" if added_first or convolution_bias else "weight"


@functools.cache
def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _leaves(values: Any) -> Iterator[Any]:
    """The values of nested lists and tuples in order, each list's length before its own."""
    for value in values:
        if isinstance(value, list | tuple):
            yield len(value)
            yield from _leaves(value)
        else:
            yield value


def _constant(leaf: Any) -> Any:
    """An argument as programs are compared: without which tensor it is, and without scales, which change no map."""
    if isinstance(leaf, Tensor):
        return "tensor"
    if isinstance(leaf, float) and leaf and math.isfinite(leaf):
        return "number"
    return leaf
