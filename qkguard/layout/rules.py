"""The two models of the paper, HypeNet and Jet-Nemotron, by rule: their code is in their checkpoints, for GPUs only.

Read off thunlp/hybrid-linear-attention (halo/modeling/hypenet) and NVlabs/Jet-Nemotron (jetai/modeling/hf). Their
linear layers own `q_proj` and `k_proj` too; which layers attend with a softmax only the config says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from qkguard.errors import UnknownLayoutError
from qkguard.layout.spec import AttentionSpec, Block, ParamMap
from qkguard.layout.spec_file import BY_HAND


@dataclass(frozen=True)
class Rule:
    """How a config describes separate, ungated q and k projections in `model.layers.{i}.self_attn`.

    `softmax` maps the entries of the config's list `types` that stand for softmax attention to the kind of layer,
    `other` has the remaining ones. `defaults` are the config class's own; a head size of None follows from the sizes.
    `rope` names the switch for rotary positions, None where they are always on.
    """

    types: str
    softmax: Mapping[str, str]
    other: frozenset[str]
    defaults: Mapping[str, Any]
    norms: bool
    rope: str | None = None


RULES = {
    "hypenet": Rule(
        types="mixer_types",
        softmax={"attn": "full_attention"},
        other=frozenset({"lightning-attn", "lightning_attn", "gdn", "kda", "mamba2"}),
        defaults={"head_dim": 128, "attention_bias": False, "attn_use_rope": True},
        norms=True,
        rope="attn_use_rope",
    ),
    "jet_nemotron": Rule(
        types="layer_types",
        softmax={"attn": "full_attention", "swa": "sliding_attention"},
        other=frozenset({"jet"}),
        defaults={"head_dim": None, "attention_bias": True},
        norms=False,
    ),
}


def specs_by_rule(config: Mapping[str, Any]) -> list[AttentionSpec]:
    """The layout of a model whose `model_type` is in RULES, from the values of its config.json.

    Raises:
        UnknownLayoutError: the config lacks a size, or lists a layer type that the rule does not know.
    """
    name, rule = config["model_type"], RULES[config["model_type"]]
    values = {**rule.defaults, **config}
    for size in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
        if size not in values:
            raise UnknownLayoutError(f"The {name} config has no {size}; save the model's config again")
    types, layers = values.get(rule.types), values["num_hidden_layers"]
    if not types:
        types = ["attn"] * layers
    if len(types) != layers:
        raise UnknownLayoutError(f"{name}: {rule.types} has {len(types)} entries for {layers} layers; {BY_HAND}")
    unknown = sorted({str(kind) for kind in types} - set(rule.softmax) - rule.other)
    if unknown:
        raise UnknownLayoutError(f"{name}: {rule.types} has {unknown[0]!r}, which no rule covers; {BY_HAND}")
    return [_layer(rule, values, i, rule.softmax[kind]) for i, kind in enumerate(types) if kind in rule.softmax]


def _layer(rule: Rule, values: Mapping[str, Any], index: int, kind: str) -> AttentionSpec:
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values["num_key_value_heads"] or heads
    head_dim = values["head_dim"] or hidden // heads
    rotary = rule.rope is None or values[rule.rope]
    module = f"model.layers.{index}.self_attn"
    params = []
    for role, count in (("k", kv_heads), ("q", heads)):
        blocks = tuple(Block(head_dim * h, head_dim * (h + 1), role, h) for h in range(count))
        rows = head_dim * count
        if values["attention_bias"]:
            params.append(ParamMap(f"{module}.{role}_proj.bias", (rows,), 0, "bias", blocks))
        params.append(ParamMap(f"{module}.{role}_proj.weight", (rows, hidden), 0, "weight", blocks))
        if rule.norms:
            gain = (Block(0, head_dim, role),)
            params.append(ParamMap(f"{module}.{role}_norm.weight", (head_dim,), 0, "norm", gain))
    return AttentionSpec(
        layer=index,
        module=module,
        kind=kind,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        params=tuple(sorted(params, key=attrgetter("name"))),
        rotary="half" if rotary else "none",
        rotary_dim=head_dim if rotary else 0,
    )
