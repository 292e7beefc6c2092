"""From attentions to layers: the module that owns an attention's projections, its number, its kind.

The config's own list of layer types, where there is one, is a second witness: where it and what ran disagree, the
layout is refused.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qkguard.errors import UnknownLayoutError
from qkguard.layout.capture import Attention
from qkguard.layout.spec_file import BY_HAND
from qkguard.layout.trace import Call, Trace

TYPE_FIELDS = ("layer_types", "layers_block_type", "attention_layers", "mixer_types")
"""`config.layer_types` and its older namesakes."""
OLDER_NAMES = {"attention": "full_attention", "global": "full_attention", "local": "sliding_attention"}
SOFTMAX_TYPES = frozenset(
    {
        "full_attention",
        "sliding_attention",
        "chunked_attention",
        "indexed_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "hybrid",
        "hybrid_sliding",
        "minimax_m3_sparse",
        "reference_sliding_attention",
        "window_attention",
    }
)
OTHER_TYPES = frozenset({"linear_attention", "conv", "moe", "mlp", "mamba", "recurrent"})


def by_owner(trace: Trace, attentions: list[Attention]) -> list[tuple[Call, list[Attention]]]:
    """Attentions by the call of the module that owns their projections, in order."""
    groups: dict[int, tuple[Call, list[Attention]]] = {}
    for attention in attentions:
        call = _owner(trace, attention)
        groups.setdefault(id(call), (call, []))[1].append(attention)
    return list(groups.values())


def _owner(trace: Trace, attention: Attention) -> Call:
    """The innermost call whose own operations lead from parameters to the query and to the key.

    A layer that borrows its keys from an earlier one has only the query's. The search ends at the layer's entry in the
    list of layers, which would hold everything of the layer.
    """
    one_of_both = None
    for call in attention.call.chain:
        query = trace.reaching(attention.query, call.start)
        key = trace.reaching(attention.key, call.start)
        if query and key:
            return call
        if (query or key) and one_of_both is None:
            one_of_both = call
        if call.name.rpartition(".")[2].isdigit():
            break
    if one_of_both is None:
        raise UnknownLayoutError(
            f"{attention.call.name} attends, but no parameter near it makes its queries or keys; {BY_HAND}"
        )
    return one_of_both


def feeding(trace: Trace, model: nn.Module, call: Call, attentions: list[Attention]) -> dict[str, str]:
    """Parameters of the owner that lead to q, k or v: name in the module -> name in the model."""
    reached: set[str] = set()
    for attention in attentions:
        for number in (attention.query, attention.key, attention.value):
            reached |= trace.reaching(number, call.start)
    names = {id(param): name for name, param in model.named_parameters()}
    local = {name: names[id(param)] for name, param in call.module.named_parameters()}
    return {name: full for name, full in local.items() if full in reached}


def program(trace: Trace, call: Call, attentions: list[Attention]) -> Any:
    """Equal for calls whose maps are equal: same class, same operations on the same shapes, attending as often."""
    return type(call.module), len(attentions), trace.program(call)


class LayerNumbers:
    """The numbered module lists of a model, counted through in the order in which their layers attend."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._first: dict[str, int] = {}  # list -> number of its first entry

    def of(self, call: Call) -> int | None:
        """Number of the outermost list entry that a call runs in; None where there is none."""
        place = _place(call)
        if place is None:
            return None
        prefix, number = place
        return self._first.setdefault(prefix, self.count) + number

    @property
    def count(self) -> int:
        """Layers in the lists met so far."""
        return sum(len(list(self._model.get_submodule(prefix).children())) for prefix in self._first)

    def that_ran(self, trace: Trace) -> set[int]:
        """Layers of those lists in which an operation ran."""
        calls = {id(operation.call): operation.call for operation in trace.operations if operation.call}
        places = [place for place in map(_place, calls.values()) if place]
        return {self._first[prefix] + number for prefix, number in places if prefix in self._first}


def _place(call: Call) -> tuple[str, int] | None:
    """(list, number) of the outermost list entry around a call."""
    for outer in reversed(list(call.chain)):
        prefix, _, last = outer.name.rpartition(".")
        if last.isdigit():
            return prefix, int(last)
    return None


def layer_types(config: Any) -> list[str] | None:
    """The kind of every layer by the config's own words, under today's names; None where it has no such list."""
    config = config.get_text_config(decoder=True)
    for field in TYPE_FIELDS:
        types = getattr(config, field, None)
        if types:
            return [OLDER_NAMES.get(kind, kind) for kind in types]
    return None


def layer_kind(types: list[str] | None, layer: int | None, options: dict[str, Any]) -> str:
    """The config's word for a layer, else what its attention function was given."""
    if types and layer is not None and layer < len(types):
        return types[layer]
    return "sliding_attention" if options.get("sliding_window") else "full_attention"


def check_layer_types(types: list[str] | None, attended: set[int | None], ran: set[int], count: int) -> None:
    """Refuse where the config's layer types and the layers that attended do not agree.

    Where the config has no such list (or one of another length, or an entry not known here), it cannot tell layers
    apart, so those of the same name must all have attended or all not. Layers that did not run have no say.

    Raises:
        UnknownLayoutError: naming the layer, the config's types and the layers seen.
    """
    named = types if types is not None and len(types) == count else ["unnamed"] * count
    for layer in sorted(ran):
        kind, did = named[layer], layer in attended
        if kind in SOFTMAX_TYPES or kind in OTHER_TYPES:
            agree = did == (kind in SOFTMAX_TYPES)
        else:
            agree = all((other in attended) == did for other in ran if named[other] == kind)
        if not agree:
            raise UnknownLayoutError(
                f"Layer {layer} is {kind!r} in the config, but softmax attention was "
                f"{'' if did else 'not '}seen there (config: {', '.join(types) if types else 'no layer types'}; "
                f"seen in layers {', '.join(map(str, sorted(attended, key=str)))}); {BY_HAND}"
            )
