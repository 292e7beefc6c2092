"""What a layer is, beyond its rows: its index and kind, the output dimension and kind of its parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from qkguard.errors import UnknownLayoutError
from qkguard.layout.capture import Call
from qkguard.layout.replay import Touched
from qkguard.layout.spec import AttentionSpec

# Entries of `config.layer_types` and its older namesakes, by whether such a layer attends with a softmax.
SOFTMAX = frozenset(
    "full_attention sliding_attention chunked_attention indexed_attention compressed_sparse_attention "
    "heavily_compressed_attention hybrid hybrid_sliding attention".split()
)
OTHER = frozenset("linear_attention conv moe mlp mamba recurrent".split())
TYPE_FIELDS = ("layer_types", "layers_block_type")


def text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def layer_types(config: Any) -> list[str] | None:
    for field in TYPE_FIELDS:
        if types := getattr(text_config(config), field, None):
            return list(types)
    return None


def layer_index(call: Call, model: nn.Module) -> int | None:
    """Index of the outermost numbered list that the call went through."""
    for name in call.path:
        for part in name.split("."):
            if part.isdigit():
                return int(part)
    return None


def layer_kind(config: Any, layer: int | None, options: dict[str, Any]) -> str:
    types = layer_types(config)
    if types and layer is not None and layer < len(types):
        return types[layer]
    return "sliding_attention" if options.get("sliding_window") else "full_attention"


def check_layer_types(config: Any, specs: list[AttentionSpec]) -> None:
    """Refuse where `layer_types` and what ran do not agree."""
    types = layer_types(config)
    if types is None:
        return
    seen = {spec.layer for spec in specs}
    for layer, kind in enumerate(types):
        if (kind in SOFTMAX and layer not in seen) or (kind in OTHER and layer in seen):
            raise UnknownLayoutError(
                f"layer {layer}: the config calls it {kind!r}, but softmax attention was "
                f"{'seen' if layer in seen else 'not seen'} there (config: {types}; seen in layers {sorted(seen)}); "
                "pass the layout by hand: spec=FILE.yaml"
            )


def owner_of(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def output_dim(module: nn.Module, name: str, touched: tuple[Touched, ...]) -> int:
    """The dimension that indexes outputs: 0, or 1 for transformers' transposed Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return 1 if isinstance(owner_of(module, name), Conv1D) and len(touched) == 2 else 0


def kind_of(module: nn.Module, name: str) -> str:
    """ "weight", "bias" (next to a matrix) or "norm" (a vector without one)."""
    owner = owner_of(module, name)
    if owner.get_parameter(name.rpartition(".")[2]).dim() > 1:
        return "weight"
    matrix = any(param is not None and param.dim() > 1 for param in owner._parameters.values())
    return "bias" if matrix else "norm"
