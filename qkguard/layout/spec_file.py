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

from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import yaml

from qkguard.errors import QKGuardError
from qkguard.layout.spec import AttentionSpec

BY_HAND = "describe its layout by hand (spec=FILE.yaml, --spec FILE.yaml)"
"""The way out that every refusal of a layout names."""


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
    text = yaml.dump({"version": 1, "attention": entries}, Dumper=_Dumper, sort_keys=False, width=110)
    return "# Where queries and keys are; the format is explained in qkguard/layout/spec_file.py.\n" + text


def load_specs(path: Path) -> list[AttentionSpec]:
    """The layout in a YAML file, in the order of the layers.

    Raises:
        QKGuardError: not readable, a key missing, unknown or of a wrong type, blocks that overlap or leave the shape.
    """
    try:
        return parse_specs(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise QKGuardError(f"Cannot read the layout {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise QKGuardError(f"{path} is not valid YAML: {error}") from None


def parse_specs(text: str, where: str) -> list[AttentionSpec]:
    """`load_specs` of a text; `where` names it in errors."""
    from qkguard.layout.spec_schema import read_layout

    try:
        return read_layout(yaml.safe_load(text), where)
    except yaml.YAMLError as error:
        raise QKGuardError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def _template(spec: AttentionSpec) -> AttentionSpec:
    """The layer with {layer} in place of its number."""
    if spec.layer is None:
        return spec

    def general(name: str) -> str:
        return ".".join("{layer}" if part == str(spec.layer) else part for part in name.split("."))

    params = tuple(replace(param, name=general(param.name)) for param in spec.params)
    return replace(spec, layer=None, module=general(spec.module), params=params)


def _entry(template: AttentionSpec, layers: list[int | None]) -> dict[str, Any]:
    entry: dict[str, Any] = {} if layers == [None] else {"layers": layers}
    for field in fields(template):
        value = getattr(template, field.name)
        if value and field.name != "params":
            entry[field.name] = value
    entry["params"] = [
        {"name": param.name, "kind": param.kind, "shape": param.shape, "dim": param.dim}
        | {"blocks": [[value for value in astuple(block) if value is not None] for block in param.blocks]}
        for param in template.params
    ]
    return entry


class _Dumper(yaml.SafeDumper):
    """Block style for mappings and lists of them, one line for lists of plain values."""


def _represent_list(dumper: _Dumper, data: Sequence[Any]) -> yaml.Node:
    plain = not any(isinstance(item, list | dict) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=plain)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(tuple, _represent_list)
