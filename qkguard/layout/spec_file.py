"""Layouts as YAML: written by `qkguard inspect --write-spec`, corrected by hand, read back with `--spec`.

    version: 1
    attention:
      - layers: [3, 7, 11]                          # {layer} in the names below stands for each of them
        module: model.layers.{layer}.self_attn
        kind: full_attention
        num_heads: 2
        num_kv_heads: 1
        head_dim: 16
        params:
          - name: model.layers.{layer}.self_attn.q_proj.weight
            shape: [64, 64]
            blocks:                                 # [first row, row after the last, what they feed, head]
              - [0, 16, q, 0]
              - [32, 48, q, 1]
          - name: model.layers.{layer}.self_attn.k_proj.weight
            shape: [16, 64]
            blocks:
              - [0, 16, k, 0]

Optional: in a layer `rotary` (half, interleaved, none), `rotary_dim`, `rotary_start`, `shares_keys`, `notes`; in a
parameter `dim` (1 where columns are meant, as in GPT-2's transposed Conv1D; default 0) and `kind` (weight, bias, norm;
default by the name). A block whose rows serve several heads has no head; one that feeds keys and values alike has the
role kv.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from qkguard.errors import QKGuardError
from qkguard.layout.spec import AttentionSpec, Block, ParamMap

BY_HAND = "describe its layout by hand (spec=FILE.yaml, --spec FILE.yaml)"
"""The way out that every refusal of a layout names."""
VERSION = 1
ROLES = ("q", "k", "qk", "qv", "kv", "qkv")
REQUIRED = ("module", "kind", "num_heads", "num_kv_heads", "head_dim", "params")
OPTIONAL = ("rotary", "rotary_dim", "rotary_start", "shares_keys", "notes")


def dump_specs(specs: Iterable[AttentionSpec]) -> str:
    """The YAML of a layout; layers that differ in their number alone share an entry."""
    groups: list[tuple[AttentionSpec, list[int | None]]] = []
    for spec in specs:
        template = _template(spec)
        for known, layers in groups:
            if known == template and spec.layer is not None and layers[0] is not None:
                layers.append(spec.layer)
                break
        else:
            groups.append((template, [spec.layer]))
    entries = [_entry(template, layers) for template, layers in groups]
    text = yaml.dump({"version": VERSION, "attention": entries}, Dumper=_Dumper, sort_keys=False, width=110)
    return "# Where queries and keys are; the format is explained in qkguard/layout/spec_file.py.\n" + text


def load_specs(path: Path) -> list[AttentionSpec]:
    """The layout in a YAML file, in the order of the layers.

    Raises:
        QKGuardError: not readable, a key missing, unknown or of a wrong type, blocks that overlap or leave the shape.
    """
    try:
        return parse_specs(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise QKGuardError(f"cannot read the layout {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise QKGuardError(f"{path} is not valid YAML: {error}") from None


def parse_specs(text: str, where: str) -> list[AttentionSpec]:
    """`load_specs` of a text; `where` names it in errors."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise QKGuardError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    _check_keys(data, where, ("version", "attention"), ())
    if data["version"] != VERSION:
        raise QKGuardError(f"{where} has version {data['version']!r}; this qkguard reads version {VERSION}")
    if not isinstance(data["attention"], list) or not data["attention"]:
        raise QKGuardError(f"{where}: attention must be a list with one entry per kind of layer")
    specs: list[AttentionSpec] = []
    for i, entry in enumerate(data["attention"]):
        specs += _specs(entry, f"{where}: attention[{i}]")
    return sorted(specs, key=_layer_order)


def _layer_order(spec: AttentionSpec) -> tuple[bool, int]:
    return spec.layer is None, spec.layer or 0


def _template(spec: AttentionSpec) -> AttentionSpec:
    """The layer with {layer} in place of its number."""
    if spec.layer is None:
        return spec

    def general(name: str) -> str:
        return ".".join("{layer}" if part == str(spec.layer) else part for part in name.split("."))

    params = tuple(replace(param, name=general(param.name)) for param in spec.params)
    return replace(spec, layer=None, module=general(spec.module), params=params)


def _entry(template: AttentionSpec, layers: Sequence[int | None]) -> dict[str, Any]:
    entry: dict[str, Any] = {} if layers[0] is None else {"layers": list(layers)}
    entry |= {key: getattr(template, key) for key in REQUIRED if key != "params"}
    for key in OPTIONAL:
        value = getattr(template, key)
        if value:
            entry[key] = list(value) if isinstance(value, tuple) else value
    entry["params"] = [
        {"name": param.name, "kind": param.kind, "shape": list(param.shape), "dim": param.dim}
        | {"blocks": [_block_values(block) for block in param.blocks]}
        for param in template.params
    ]
    return entry


def _block_values(block: Block) -> list[Any]:
    values = [block.start, block.stop, block.role]
    return values if block.head is None else [*values, block.head]


def _specs(entry: Any, where: str) -> list[AttentionSpec]:
    _check_keys(entry, where, REQUIRED, ("layers", *OPTIONAL))
    layers = entry.get("layers", [None])
    if not isinstance(layers, list) or not layers or not all(n is None or _is_count(n) for n in layers):
        raise QKGuardError(f"{where}: layers must be a list of layer numbers, found {layers!r}")
    for key in ("num_heads", "num_kv_heads", "head_dim"):
        if not _is_count(entry[key]) or not entry[key]:
            raise QKGuardError(f"{where}: {key} must be a positive number, found {entry[key]!r}")
    for key in ("module", "kind"):
        if not isinstance(entry[key], str):
            raise QKGuardError(f"{where}: {key} must be text, found {entry[key]!r}")
    if entry.get("rotary") not in (None, "half", "interleaved", "none"):
        raise QKGuardError(f"{where}: rotary must be half, interleaved or none, found {entry['rotary']!r}")
    if not isinstance(entry["params"], list) or not entry["params"]:
        raise QKGuardError(f"{where}: params must be a list")
    params = tuple(_param(param, f"{where}.params[{i}]") for i, param in enumerate(entry["params"]))
    options = {key: entry[key] for key in OPTIONAL if key in entry}
    options["notes"] = tuple(options.get("notes") or ())
    values = {key: entry[key] for key in REQUIRED if key != "params"}
    template = AttentionSpec(layer=None, **values, params=params, **options)
    return [_numbered(template, layer) for layer in layers]


def _numbered(template: AttentionSpec, layer: int | None) -> AttentionSpec:
    if layer is None:
        return template
    params = tuple(replace(p, name=p.name.replace("{layer}", str(layer))) for p in template.params)
    return replace(template, layer=layer, module=template.module.replace("{layer}", str(layer)), params=params)


def _param(entry: Any, where: str) -> ParamMap:
    _check_keys(entry, where, ("name", "shape", "blocks"), ("dim", "kind"))
    name, shape, dim = entry["name"], entry["shape"], entry.get("dim", 0)
    kind = entry.get("kind", "bias" if str(name).endswith("bias") else "weight")
    if not isinstance(name, str) or kind not in ("weight", "bias", "norm"):
        raise QKGuardError(f"{where}: name must be text and kind one of weight, bias, norm")
    if not isinstance(shape, list) or not shape or not all(map(_is_count, shape)) or dim not in range(len(shape)):
        raise QKGuardError(f"{where}: shape must be a list of sizes and dim one of its dimensions")
    if not isinstance(entry["blocks"], list) or not entry["blocks"]:
        raise QKGuardError(f"{where}: blocks must be a list of [first, after last, role, head]")
    blocks = tuple(sorted(_block(block, f"{where}.blocks[{i}]") for i, block in enumerate(entry["blocks"])))
    try:
        return ParamMap(name, tuple(shape), dim, kind, blocks)
    except QKGuardError as error:
        raise QKGuardError(f"{where}: {error}") from None


def _block(block: Any, where: str) -> Block:
    if not isinstance(block, list) or len(block) not in (3, 4) or block[2] not in ROLES:
        raise QKGuardError(f"{where}: expected [first, after last, {' | '.join(ROLES)}, head], found {block!r}")
    if not all(_is_count(number) for number in (*block[:2], *block[3:])):
        raise QKGuardError(f"{where}: rows and head must be numbers from 0, found {block!r}")
    return Block(*block)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_keys(entry: Any, where: str, required: Sequence[str], optional: Sequence[str]) -> None:
    if not isinstance(entry, Mapping):
        raise QKGuardError(f"{where}: expected the keys {', '.join(required)}, found {type(entry).__name__}")
    for key in entry:
        if key not in (*required, *optional):
            near = get_close_matches(str(key), (*required, *optional), 1)
            raise QKGuardError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    missing = [key for key in required if key not in entry]
    if missing:
        raise QKGuardError(f"{where}: {', '.join(missing)} missing")


class _Dumper(yaml.SafeDumper):
    """Block style for mappings and lists of them, one line for lists of plain values."""


def _represent_list(dumper: _Dumper, data: list[Any]) -> yaml.Node:
    plain = not any(isinstance(item, list | dict) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=plain)


_Dumper.add_representer(list, _represent_list)
