"""`find_attention`: from a model's behaviour to the rows that make its queries and keys.

The trip: the model's class on the meta device (`architecture`), one forward pass and the attentions in it (`observe`,
`capture`, on a `trace`), their owners and layers (`layers`), a replay of one owner per program (`replay`), what its
gradients reach (`gradients`), and here the blocks of rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkguard.errors import UnknownLayoutError
from qkguard.layout.architecture import Architecture, build_meta, find_architecture, plain_torch
from qkguard.layout.capture import Attention
from qkguard.layout.layers import (
    LayerNumbers,
    by_owner,
    check_layer_types,
    feeding,
    layer_kind,
    layer_types,
    program,
)
from qkguard.layout.names import with_live_names
from qkguard.layout.observe import observed
from qkguard.layout.replay import Replay, Rows, replay
from qkguard.layout.rules import specs_by_rule
from qkguard.layout.spec import AttentionSpec, Block, ParamMap
from qkguard.layout.spec_file import BY_HAND, load_specs
from qkguard.layout.trace import Call, Trace

BORROWED = "keys are borrowed from an earlier layer"


def find_attention(model_or_config: Any, *, spec: Any = None, trust_remote_code: bool = False) -> list[AttentionSpec]:
    """Every softmax-attention layer of a model with the rows that make its queries and keys.

    Works on the class and the config alone: a live model is neither forwarded nor changed, and may be sharded
    (ZeRO-3, DTensor) or wrapped (DDP, torch.compile, PEFT); names are those of its `named_parameters()`.

    Args:
        model_or_config: a transformers model, a config, a folder, a hub id or the path of a config.json.
        spec: the layout by hand: a list of AttentionSpec, or the path of a YAML file (see `spec_file`). Nothing is
            then looked for; with a live model, names and shapes are checked against it.
        trust_remote_code: allow a config's own code to be imported.

    Raises:
        UnknownLayoutError: the layout cannot be established for certain.

    Example:
        >>> for spec in find_attention("Qwen/Qwen3-Next-80B-A3B-Instruct"):
        ...     print(spec.layer, [(param.name, param.ranges) for param in spec.params])
    """
    if isinstance(spec, str | os.PathLike):
        specs = load_specs(Path(spec))
    elif spec is not None:
        specs = list(spec)
    else:
        architecture = find_architecture(model_or_config, trust_remote_code=trust_remote_code)
        if architecture.model_class is None:
            specs = specs_by_rule(vars(architecture.config))
        else:
            specs = _discover(architecture)
    return with_live_names(specs, model_or_config) if isinstance(model_or_config, nn.Module) else specs


def _discover(architecture: Architecture) -> list[AttentionSpec]:
    types = layer_types(architecture.config)
    attended: set[int | None] = set()
    owned: set[str] = set()
    specs: list[AttentionSpec] = []
    with plain_torch():
        model = build_meta(architecture)
        numbers = LayerNumbers(model)
        with observed(model) as (trace, attentions):
            maps = _RowMaps(model, trace)
            for call, own in by_owner(trace, attentions):
                layer = numbers.of(call)
                attended.add(layer)
                spec = maps.of(call, own)
                names = {param.name for param in spec.params}
                if owned >= names:
                    continue  # a module that runs in several layers belongs to the first
                owned |= names
                kind = layer_kind(types, layer, own[0].options)
                notes = tuple(_notes(trace, call, own, spec.params))
                specs.append(replace(spec, layer=layer, kind=kind, notes=notes))
            check_layer_types(types, attended, numbers.that_ran(trace), numbers.count)
    if any(BORROWED in spec.notes for spec in specs):  # from which layer is not known, so it may be any
        specs = [replace(spec, shares_keys=True) for spec in specs]
    return specs


def _notes(trace: Trace, call: Call, attentions: list[Attention], params: tuple[ParamMap, ...]) -> Iterator[str]:
    """What a reader of the map should know beyond the map."""
    makes_keys = [trace.reaching(attention.key, call.start) for attention in attentions]
    makes_queries = [trace.reaching(attention.query, call.start) for attention in attentions]
    if not all(makes_keys):
        yield BORROWED
    chosen = set().union(*makes_keys, *makes_queries) - {param.name for param in params}
    if chosen:
        names = ", ".join(sorted(chosen))
        yield f"queries or keys also depend on a choice made by {names}, which has no rows of theirs"
    if any(block.shared for param in params if param.kind != "norm" for block in param.blocks):
        yield "some rows feed keys and values alike"


class _RowMaps:
    """Row maps per call, with one replay for all calls that run the same program."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self._model, self._trace = model, trace
        self._known: dict[Any, AttentionSpec] = {}

    def of(self, call: Call, attentions: list[Attention]) -> AttentionSpec:
        """The call's parameters and geometry; its number and its kind are the caller's to fill in."""
        names = feeding(self._trace, self._model, call, attentions)
        key = program(self._trace, call, attentions)
        if key not in self._known:
            self._known[key] = self._replayed(call, names, attentions)
        known = self._known[key]
        params = sorted((replace(param, name=names[param.name]) for param in known.params), key=attrgetter("name"))
        return replace(known, module=call.name, params=tuple(params))

    def _replayed(self, call: Call, names: dict[str, str], attentions: list[Attention]) -> AttentionSpec:
        """The layer by a replay, under the parameters' names in the module."""
        shown = replay(call, set(names), attentions)
        params = tuple(
            ParamMap(name, rows.shape, rows.dim, self._trace.kind(names[name]), _blocks(name, rows, shown))
            for name, rows in shown.rows.items()
        )
        return AttentionSpec(
            layer=None,
            module=call.name,
            kind="",
            num_heads=shown.num_heads,
            num_kv_heads=shown.num_kv_heads,
            head_dim=shown.head_dim,
            params=params,
            rotary=shown.rotary,
            rotary_dim=shown.rotary_dim,
            rotary_start=shown.rotary_start,
        )


def _blocks(name: str, rows: Rows, shown: Replay) -> tuple[Block, ...]:
    """Neighbouring rows that feed the same things, as blocks; rows that feed neither q nor k are left out."""
    feeds = torch.stack([rows.q, rows.k, rows.v], 1).long()
    head = torch.full_like(feeds[:, 0], -1)
    for column, head_of, heads in ((0, rows.q_head, shown.num_heads), (1, rows.k_head, shown.num_kv_heads)):
        alone = (feeds[:, column] == 1) & (feeds.sum(1) == 1)
        sizes = torch.bincount(head_of[alone & (head_of >= 0)], minlength=heads).tolist()
        if len(set(sizes)) == 1:
            head[alone] = head_of[alone]
        elif len(rows.shape) < 3:  # in a stack (of experts), a row serves whichever heads its matrix was chosen for
            # No model is built like that, so some rows must have been missed.
            raise UnknownLayoutError(
                f"{name}: {min(sizes)} to {max(sizes)} rows seem to make a {'qk'[column]} head, but all heads should "
                f"have the same number; {BY_HAND}"
            )
    alike, lengths = torch.unique_consecutive(torch.cat([feeds, head[:, None]], 1), return_counts=True, dim=0)
    blocks, start = [], 0
    for (q, k, v, one), length in zip(alike.tolist(), lengths.tolist(), strict=True):
        if q or k:
            blocks.append(Block(start, start + length, "q" * q + "k" * k + "v" * v, None if one < 0 else one))
        start += length
    return tuple(blocks)
