"""Whose queries and keys an attention uses: the module that owns their projections, and what tells its program."""

from __future__ import annotations

from typing import Any

from torch import nn

from qkguard.errors import UnknownLayoutError
from qkguard.layout.build import BY_HAND
from qkguard.layout.capture import Seen
from qkguard.layout.trace import Call, Trace


def by_owner(trace: Trace, seen: list[Seen]) -> list[tuple[Call, list[Seen]]]:
    """Attentions by the call of the module that owns their projections, in order."""
    groups: dict[int, tuple[Call, list[Seen]]] = {}
    for found in seen:
        call = _owner(trace, found)
        groups.setdefault(id(call), (call, []))[1].append(found)
    return list(groups.values())


def program(trace: Trace, call: Call, found: list[Seen]) -> Any:
    """Equal for calls whose maps are equal: same class, same operations on the same shapes, attending as often."""
    return type(call.module), len(found), trace.program(call)


def feeding(trace: Trace, model: nn.Module, call: Call, found: list[Seen]) -> dict[str, str]:
    """Parameters of the owner that lead to q, k or v: name in the module -> name in the model."""
    reached = set().union(
        *(trace.reaching(key, call.start) for one in found for key in (one.query, one.key, one.value))
    )
    names = {id(param): name for name, param in model.named_parameters()}
    local = {name: names[id(param)] for name, param in call.module.named_parameters()}
    return {name: full for name, full in local.items() if full in reached}


def _owner(trace: Trace, found: Seen) -> Call:
    """The innermost call whose own operations lead from parameters to the query and to the key.

    A layer that borrows its keys from an earlier one has only the query's; no further out than its entry in the list
    of layers, where everything of the layer would be inside.
    """
    query_only = None
    for call in found.call.chain:
        query, key = (trace.reaching(operand, call.start) for operand in (found.query, found.key))
        if query and key:
            return call
        if (query or key) and query_only is None:
            query_only = call
        if call.name.rpartition(".")[2].isdigit():
            break
    if query_only is None:
        raise UnknownLayoutError(
            f"{found.call.name} attends, but no parameter near it makes its queries or keys; {BY_HAND}"
        )
    return query_only
