"""The groups that a model's weights fall into, for attribution: each row of each tensor in exactly one of them.

Queries and keys are known from the layout, values and outputs by what they do (`value_output`). Everything else goes
by the classes and names of the modules that hold it. What these do not settle is in a group of its own, "other".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkguard.choice.value_output import value_output_by_layer
from qkguard.layout.layers import OTHER_TYPES, layer_types
from qkguard.layout.selection import up_to_layer
from qkguard.layout.spec import AttentionSpec, Block, ParamMap, true_ranges

TITLES = {
    "qk": "queries and keys",
    "vo": "values and outputs",
    "mixers": "linear-attention, SSM and convolution mixers",
    "mlp": "MLPs, experts and routers",
    "norms": "norms and embeddings",
    "shared": "rows that keys and values share",
    "other": "other weights",
}
"""Every group by its short name, in the order in which they are shown."""

NORM = re.compile(r"norm|^ln_|^ln\d", re.I)
MIXER = re.compile(
    r"mamba|ssm|linear_?att|lightning|delta|conv|rwkv|retention|recurrent|rg_?lru|time_?mix|[ms]lstm|hyena|\bkda\b",
    re.I,
)
ATTENTION = re.compile(r"^(self_?)?att(n|ention)$", re.I)
AROUND_ATTENTION = re.compile(r"att", re.I)
MLP = re.compile(
    r"mlp|ffn|^ff$|feed_?forward|expert|moe|router|channel_?mix|^fc\d|^fc_(in|out)|^intermediate$|^output$", re.I
)
VALUE_OUTPUT = re.compile(r"^(v|o|out|value|output|dense|c_proj|wv|wo|[vo]_proj|out_proj|o_lin|v_lin|out_lin)$")


class Part(NamedTuple):
    """Some rows of a tensor of the model, by its name in `state_dict()`; all of it where `rows` is None."""

    name: str
    rows: ParamMap | None

    def take(self, full: Tensor) -> Tensor:
        """The part of a tensor."""
        return full if self.rows is None else self.rows.take(full)

    def put(self, full: Tensor, new: Tensor) -> None:
        """Write the part of another tensor of this shape into `full`, in place."""
        if self.rows is None:
            full.copy_(new)
        else:
            self.rows.put(full, self.rows.take(new).to(full))

    def __str__(self) -> str:
        if self.rows is None:
            return self.name
        return f"{self.name}[{', '.join(f'{lo}:{hi}' for lo, hi in self.rows.ranges)}]"


@dataclass(frozen=True)
class WeightGroup:
    """One group: its short name (of `TITLES`), its parts in the model's order, and how many elements they hold."""

    key: str
    parts: tuple[Part, ...]
    elements: int

    @property
    def title(self) -> str:
        return TITLES[self.key]


def find_groups(
    model: nn.Module, specs: Sequence[AttentionSpec], *, include_norms: bool = False, shared: str = "keep"
) -> list[WeightGroup]:
    """Every parameter and persistent buffer of a model, row by row, in exactly one group; tied ones count once.

    Args:
        model: a transformers model with its weights; one forward pass of a few tokens finds values and outputs.
        specs: its attention layers (`find_attention`).
        include_norms: q/k norms belong to queries and keys, as in `RowSelection`; else to the norms.
        shared: as in `RowSelection`: "restore" counts rows that keys and values share (MLA's latent) to queries and
            keys; otherwise they are a group.

    Returns:
        The groups that are not empty, in the order of `TITLES`. A norm is a norm wherever it stands, inside a mixer
        too. "other" holds what nothing settles: output gates, attention sinks, token selectors, vision towers.
    """
    places = _Places(model, specs)
    claims = _claimed(model, specs, include_norms, shared)
    parts: dict[str, list[Part]] = {key: [] for key in TITLES}
    sizes = dict.fromkeys(TITLES, 0)
    for name, tensor in weights_of(model).items():
        claim = claims.get(name)
        if claim is None:
            key = places.find(name)
            parts[key].append(Part(name, None))
            sizes[key] += tensor.numel()
            continue
        for key, part in _split(name, tensor, claim, places.find(name, rest_of_fused=claim.fused)):
            parts[key].append(part)
            sizes[key] += tensor.numel() if part.rows is None else part.rows.numel
    return [WeightGroup(key, tuple(found), sizes[key]) for key, found in parts.items() if found]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `state_dict()` that are a model's own: a tied one by its first name alone."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tensor.data
    return out


@dataclass
class _Claim:
    """The group of every row of one parameter along `dim`; "" where nothing claims it."""

    dim: int
    rows: list[str]
    fused: bool = False

    def add(self, param: ParamMap, key: str | None = None) -> None:
        """Claim a map's rows for a group, or for queries and keys or the shared rows; the first claim stays."""
        for block in param.blocks:
            for row in range(block.start, block.stop):
                self.rows[row] = self.rows[row] or key or ("shared" if block.shared else "qk")


def _claimed(model: nn.Module, specs: Sequence[AttentionSpec], include_norms: bool, shared: str) -> dict[str, _Claim]:
    claims: dict[str, _Claim] = {}
    for spec in specs:
        for param in spec.params:
            if param.kind != "norm" or include_norms:
                claim = claims.setdefault(param.name, _Claim(param.dim, [""] * param.shape[param.dim]))
                claim.add(param, "qk" if shared == "restore" else None)
                claim.fused |= {"q", "k"} <= {letter for block in param.blocks for letter in block.role}
    for found in value_output_by_layer(model, specs):
        for param in (*found["v"], *found["o"]):
            claims.setdefault(param.name, _Claim(param.dim, [""] * param.shape[param.dim])).add(param, "vo")
    return claims


def _split(name: str, tensor: Tensor, claim: _Claim, rest: str) -> Iterator[tuple[str, Part]]:
    """(group, part) of a parameter whose rows belong to one group or several."""
    keys = [key or rest for key in claim.rows]
    for key in TITLES:
        if key not in keys:
            continue
        blocks = tuple(Block(lo, hi, "q") for lo, hi in true_ranges(torch.tensor([k == key for k in keys])))
        rows = ParamMap(name, tuple(tensor.shape), claim.dim, "bias" if tensor.dim() == 1 else "weight", blocks)
        yield key, Part(name, None if rows.whole else rows)


class _Places:
    """Groups by where a tensor stands in the model."""

    def __init__(self, model: nn.Module, specs: Sequence[AttentionSpec]) -> None:
        self.modules = dict(model.named_modules())
        self.family = re.sub(r"(For|LMHead|With)[A-Z].*$|Model$", "", type(model).__name__)  # "GraniteMoeHybrid"
        self.attention = {spec.module for spec in specs}
        lists = {_layer_list(spec.module) for spec in specs}
        self.lists = tuple(f"{prefix}." for prefix in lists if prefix is not None)
        self.roots = tuple({self._language_model(prefix) for prefix in lists if prefix is not None})
        self.norms = {param.name for spec in specs for param in spec.params if param.kind == "norm"}
        self.types = layer_types(model.config)
        self.embeddings = {id(module) for module in _embeddings(model)}

    def find(self, name: str, *, rest_of_fused: bool = False) -> str:
        """The group of a tensor, of which no row is claimed by the layout; "other" where nothing settles it."""
        owner, last = name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[2]
        module = self.modules[owner]
        if id(module) in self.embeddings:
            return "norms"
        if not any(_inside(name, root) for root in self.roots):
            return "other"  # another tower than the language model's
        if name in self.norms or NORM.search(type(module).__name__) or NORM.search(last):
            return "norms"
        if isinstance(module, nn.Embedding):
            return "norms"
        prefix = next((prefix for prefix in self.lists if name.startswith(prefix)), None)
        return "other" if prefix is None else self._in_layer(owner.split("."), prefix, rest_of_fused)

    def _in_layer(self, path: list[str], prefix: str, rest_of_fused: bool) -> str:
        """By the outermost module below the layer whose name or class tells; `path` is the owner's."""
        first = prefix.count(".") + 1  # the number of the layer stands before it
        attends = False
        for end in range(first + 1, len(path) + 1):
            name = ".".join(path[:end])
            words = path[end - 1], type(self.modules[name]).__name__.removeprefix(self.family)
            if any(_inside(attention, name) for attention in self.attention):  # it is one, or is around one
                attends |= name in self.attention or AROUND_ATTENTION.search(words[0]) is not None
            elif attends:
                break
            elif any(MLP.search(word) for word in words):
                return "mlp"
            elif any(MIXER.search(word) for word in words) or self._replaces_attention(path[first - 1], words[0]):
                return "mixers"
        return "vo" if attends and (rest_of_fused or VALUE_OUTPUT.search(path[-1])) else "other"

    def _replaces_attention(self, layer: str, name: str) -> bool:
        """Whether a module is called attention in a layer that the config says has none of softmax's."""
        kind = self.types[int(layer)] if self.types and int(layer) < len(self.types) else None
        return kind in OTHER_TYPES and ATTENTION.search(name) is not None

    def _language_model(self, layers: str) -> str:
        """The innermost transformers model around a list of layers: what is beside it is another tower."""
        path = layers.split(".")
        around = [".".join(path[:end]) for end in range(len(path), -1, -1)]
        return next((name for name in around if hasattr(self.modules[name], "config_class")), "")


def _layer_list(module: str) -> str | None:
    """ "model.layers.3.self_attn" -> "model.layers"."""
    layer = up_to_layer(module)
    return None if layer is None else layer.rpartition(".")[0]


def _inside(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _embeddings(model: Any) -> Iterator[nn.Module]:
    """The modules that tokens come in by and go out by."""
    for method in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, method)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            yield module
