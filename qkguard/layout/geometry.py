"""What a layer is, beyond its rows: its index and kind, the output dimension and kind of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.errors import UnknownLayoutError
from qkguard.layout.build import BY_HAND
from qkguard.layout.trace import Call, Trace

# Entries of `config.layer_types` and its older namesakes, by whether such a layer attends with a softmax.
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
TYPE_FIELDS = ("layer_types", "layers_block_type", "attention_layers", "mixer_types")
OLDER_NAMES = {"attention": "full_attention", "global": "full_attention", "local": "sliding_attention"}


class Layers:
    """The numbered module lists of a model, counted through in the order in which their layers attend."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._first: dict[str, int] = {}

    def index(self, call: Call) -> int | None:
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

    def ran(self, trace: Trace) -> set[int]:
        """Layers of those lists that did anything."""
        places = {_place(call) for call in {id(node.call): node.call for node in trace.nodes}.values() if call}
        return {self._first[place[0]] + place[1] for place in places if place and place[0] in self._first}


def _place(call: Call) -> tuple[str, int] | None:
    """(list, number) of the outermost list entry around a call."""
    for outer in reversed(list(call.chain)):
        prefix, _, last = outer.name.rpartition(".")
        if last.isdigit():
            return prefix, int(last)
    return None


def layer_types(config: Any) -> list[str] | None:
    config = config.get_text_config(decoder=True)
    for field in TYPE_FIELDS:
        if types := getattr(config, field, None):
            return [OLDER_NAMES.get(kind, kind) for kind in types]
    return None


def layer_kind(types: list[str] | None, layer: int | None, options: dict[str, Any]) -> str:
    if types and layer is not None and layer < len(types):
        return types[layer]
    return "sliding_attention" if options.get("sliding_window") else "full_attention"


def check_layer_types(types: list[str] | None, attended: set[int | None], ran: set[int], count: int) -> None:
    """Refuse where the config's layer types and the layers that attended do not agree.

    Where the config has no such list (or one of another length, or an entry not known here), it cannot tell layers
    apart, so those of the same name must all have attended or all not. Layers that did not run have no say.
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
                f"layer {layer} is {kind!r} to the config, but softmax attention was "
                f"{'' if did else 'not '}seen there (config: {', '.join(types) if types else 'no layer types'}; "
                f"seen in layers {', '.join(map(str, sorted(attended, key=str)))}); {BY_HAND}"
            )


def output_dims(owner: nn.Module, reached: Sequence[Sequence[Tensor]]) -> list[int]:
    """The dimensions that may index outputs, likeliest first, given which slices of each q, k and v reach.

    Those that keep q, k and v apart best. Among them usually the first of a matrix, a vector and a convolution; the
    second of transformers' transposed Conv1D; the last but one of a stack of matrices (experts).
    """
    from transformers.pytorch_utils import Conv1D

    dims = len(reached[0])
    stacked = dims > 2 and not isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    usual = dims - 2 if stacked else int(dims == 2 and isinstance(owner, Conv1D))

    def shared(dim: int) -> float:
        return float((torch.stack([masks[dim] for masks in reached]).sum(0) > 1).float().mean())

    least = min(map(shared, range(dims)))
    return sorted((dim for dim in range(dims) if shared(dim) == least), key=lambda dim: dim != usual)
