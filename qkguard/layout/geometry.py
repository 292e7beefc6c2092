"""What a layer is, beyond its rows: its index and kind, the output dimension and kind of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.errors import UnknownLayoutError
from qkguard.layout.trace import Call

# Entries of `config.layer_types` and its older namesakes, by whether such a layer attends with a softmax.
SOFTMAX_TYPES = frozenset(
    {
        "attention",
        "full_attention",
        "sliding_attention",
        "chunked_attention",
        "indexed_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "hybrid",
        "hybrid_sliding",
    }
)
OTHER_TYPES = frozenset({"linear_attention", "conv", "moe", "mlp", "mamba", "recurrent"})
TYPE_FIELDS = ("layer_types", "layers_block_type")


class Layers:
    """The numbered module lists of a model, counted through in the order in which their layers attend."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._first: dict[str, int] = {}

    def index(self, call: Call) -> int | None:
        """Number of the outermost list entry that a call runs in; None where there is none."""
        for outer in reversed(list(call.chain)):
            prefix, _, last = outer.name.rpartition(".")
            if last.isdigit():
                if prefix not in self._first:
                    self._first[prefix] = sum(len(list(self._model.get_submodule(p).children())) for p in self._first)
                return self._first[prefix] + int(last)
        return None

    @property
    def count(self) -> int:
        return sum(len(list(self._model.get_submodule(prefix).children())) for prefix in self._first)


def layer_types(config: Any) -> list[str] | None:
    config = config.get_text_config(decoder=True)
    for field in TYPE_FIELDS:
        if types := getattr(config, field, None):
            return list(types)
    return None


def layer_kind(types: list[str] | None, layer: int | None, options: dict[str, Any]) -> str:
    if types and layer is not None and layer < len(types):
        return types[layer]
    return "sliding_attention" if options.get("sliding_window") else "full_attention"


def check_layer_types(types: list[str] | None, attended: set[int | None], count: int) -> None:
    """Refuse where the config's layer types and the layers that attended do not agree.

    A model whose config has no such list, or one for other lists of layers, can only be taken by what it did.
    """
    if types is None or len(types) != count:
        return
    for layer, kind in enumerate(types):
        if (kind in SOFTMAX_TYPES and layer not in attended) or (kind in OTHER_TYPES and layer in attended):
            raise UnknownLayoutError(
                f"layer {layer}: the config calls it {kind!r}, but softmax attention was "
                f"{'seen' if layer in attended else 'not seen'} there (config: {', '.join(types)}; seen in layers "
                f"{', '.join(str(n) for n in sorted(attended, key=str))}); pass the layout by hand: spec=FILE.yaml"
            )


def output_dim(owner: nn.Module, reached: Sequence[Sequence[Tensor]]) -> int:
    """The dimension that indexes outputs, given which slices of each dimension q, k and v reach.

    The first of a matrix, a vector and a convolution; the second of transformers' transposed Conv1D; the last but one
    of a stack of matrices (experts). Where another one keeps q, k and v apart better, that one.
    """
    from transformers.pytorch_utils import Conv1D

    dims = len(reached[0])
    stacked = dims > 2 and not isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    usual = dims - 2 if stacked else int(dims == 2 and isinstance(owner, Conv1D))

    def shared(dim: int) -> float:
        return float((torch.stack([masks[dim] for masks in reached]).sum(0) > 1).float().mean())

    return min(range(dims), key=lambda dim: (shared(dim), dim != usual))


def kind_of(owner: nn.Module, shape: tuple[int, ...]) -> str:
    """ "weight", "bias" (a vector next to a matrix) or "norm" (a vector alone)."""
    if sum(n > 1 for n in shape) > 1:
        return "weight"
    return "bias" if any(p is not None and p.dim() > 1 for p in owner._parameters.values()) else "norm"
