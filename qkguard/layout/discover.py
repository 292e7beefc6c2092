"""`find_attention`: from a model's behaviour to row maps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkguard.errors import UnknownLayoutError
from qkguard.layout import build, geometry
from qkguard.layout.capture import Seen
from qkguard.layout.forward import attended
from qkguard.layout.owners import by_owner, feeding, program
from qkguard.layout.replay import Replay, Rows, replay
from qkguard.layout.spec import AttentionSpec, Block, ParamMap
from qkguard.layout.spec_file import load_specs
from qkguard.layout.static import static_specs
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
        UnknownLayoutError: where the layout cannot be established for certain.
    """
    if spec is not None:
        specs = load_specs(Path(spec)) if isinstance(spec, str | os.PathLike) else list(spec)
        return _named_as_live(specs, model_or_config) if isinstance(model_or_config, nn.Module) else specs
    source = build.resolve(model_or_config, trust_remote_code=trust_remote_code)
    if source.model_class is None:
        specs = static_specs(vars(source.config))
    else:
        with build.undisturbed():
            specs = _discover(source)
    return specs if source.live is None else _named_as_live(specs, source.live)


def _discover(source: build.Source) -> list[AttentionSpec]:
    model = build.build_meta(source)
    types = geometry.layer_types(source.config)
    layers = geometry.Layers(model)
    seen_layers: set[int | None] = set()
    owned: set[str] = set()
    specs: list[AttentionSpec] = []
    with attended(model) as (trace, seen):
        maps = _Maps(model, trace)
        for call, found in by_owner(trace, seen):
            layer = layers.index(call)
            seen_layers.add(layer)
            shown, params = maps.of(call, found)
            if all(param.name in owned for param in params):
                continue
            owned.update(param.name for param in params)
            specs.append(
                AttentionSpec(
                    layer=layer,
                    module=call.name,
                    kind=geometry.layer_kind(types, layer, found[0].options),
                    num_heads=shown.num_heads,
                    num_kv_heads=shown.num_kv_heads,
                    head_dim=shown.head_dim,
                    params=params,
                    rotary=shown.rotary,
                    rotary_dim=shown.rotary_dim,
                    rotary_start=shown.rotary_start,
                    notes=tuple(_notes(trace, call, found, params)),
                )
            )
        geometry.check_layer_types(types, seen_layers, layers.ran(trace), layers.count)
    if any(BORROWED in spec.notes for spec in specs):  # from which layer is not known
        specs = [replace(spec, shares_keys=True) for spec in specs]
    return specs


def _notes(trace: Trace, call: Call, found: list[Seen], params: tuple[ParamMap, ...]) -> Iterator[str]:
    """What a reader of the map should know beyond the map."""
    mapped = {param.name for param in params}
    reaching = {key: trace.reaching(key, call.start) for one in found for key in (one.query, one.key)}
    if not all(reaching[one.key] for one in found):
        yield BORROWED
    if chosen := sorted(set().union(*reaching.values()) - mapped):
        yield f"queries or keys also depend on a choice made by {', '.join(chosen)}, which has no rows of theirs"
    if any(block.shared and param.kind != "norm" for param in params for block in param.blocks):
        yield "some rows feed keys and values alike"


class _Maps:
    """Row maps per call, with one replay for all calls that run the same program."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self._model, self._trace = model, trace
        self._known: dict[Any, tuple[Replay, dict[str, ParamMap]]] = {}

    def of(self, call: Call, found: list[Seen]) -> tuple[Replay, tuple[ParamMap, ...]]:
        """What the replay showed, and the call's parameters under their names in the model."""
        names = feeding(self._trace, self._model, call, found)
        key = program(self._trace, call, found)
        if key not in self._known:
            shown = replay(call, set(names), len(found), all(one.scores is None for one in found))
            self._known[key] = (
                shown,
                {
                    name: ParamMap(
                        name, rows.shape, rows.dim, self._trace.use(names[name]), _blocks(name, rows, shown)
                    )
                    for name, rows in shown.rows.items()
                },
            )
        shown, maps = self._known[key]
        named = (replace(param, name=names[name]) for name, param in maps.items())
        return shown, tuple(sorted(named, key=lambda param: param.name))


def _blocks(name: str, rows: Rows, shown: Replay) -> tuple[Block, ...]:
    """Neighbouring rows that feed the same things, as blocks; rows that feed neither q nor k are left out.

    Raises UnknownLayoutError where heads come out with different numbers of rows: nothing is built like that, so some
    rows must have been missed.
    """
    feeds = torch.stack([rows.q, rows.k, rows.v], 1).long()
    head = torch.full_like(feeds[:, 0], -1)
    for column, of, heads in ((0, rows.q_head, shown.num_heads), (1, rows.k_head, shown.num_kv_heads)):
        alone = (feeds[:, column] == 1) & (feeds.sum(1) == 1)
        sizes = torch.bincount(of[alone & (of >= 0)], minlength=heads)
        if len(set(sizes.tolist())) == 1:
            head[alone] = of[alone]
        elif len(rows.shape) < 3:  # in a stack (of experts), a row serves whichever heads its matrix was chosen for
            raise UnknownLayoutError(
                f"{name}: {int(sizes.min())} to {int(sizes.max())} rows seem to make a {'qk'[column]} head, where all "
                f"heads should have the same number; {build.BY_HAND}"
            )
    runs, lengths = torch.unique_consecutive(torch.cat([feeds, head[:, None]], 1), return_counts=True, dim=0)
    blocks, start = [], 0
    for (q, k, v, one), length in zip(runs.tolist(), lengths.tolist(), strict=True):
        if q or k:
            blocks.append(Block(start, start + length, "q" * q + "k" * k + "v" * v, None if one < 0 else one))
        start += length
    return tuple(blocks)


def _named_as_live(specs: list[AttentionSpec], live: nn.Module) -> list[AttentionSpec]:
    """The same specs under the live model's parameter names, which must all exist with the expected shapes."""
    params = dict(live.named_parameters())
    names = {name: name for name in params} | build.live_names(live)
    out = []
    for spec in specs:
        maps = []
        for param in spec.params:
            if param.name not in names:
                raise UnknownLayoutError(
                    f"the layout names {param.name}, which the model does not have; where the model's structure was "
                    f"changed after it was built, {build.BY_HAND}"
                )
            shape = build.full_shape(params[names[param.name]])
            if shape != param.shape:
                raise UnknownLayoutError(
                    f"{param.name}: the layout says shape {param.shape}, the model has {shape}; its config (or the "
                    "spec file) belongs to another model"
                )
            maps.append(replace(param, name=names[param.name]))
        out.append(replace(spec, params=tuple(maps)))
    return out
