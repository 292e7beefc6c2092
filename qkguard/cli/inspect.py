"""`qkguard inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qkguard.cli import options as opt
from qkguard.cli.output import leave_without_collecting, print_json, print_table, quiet_transformers, say, warn
from qkguard.errors import QKGuardError
from qkguard.report.numbers import human_bytes


def inspect(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a hub id or the path of a config.json.")],
    spec: opt.Spec = None,
    trust_remote_code: opt.RemoteCode = False,
    write_spec: Annotated[
        Path | None, typer.Option("--write-spec", help="Write the layout as YAML, to correct and use with --spec.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Prove it: change the rows of a copy and watch what moves, bit for bit.")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Show which rows of which tensors are queries and keys.

    Found by what the model's code does on an empty copy; no weights are needed. Rows that are neither query nor key
    (values, output gates) are not listed and never touched.

    \b
    Example:
      qkguard inspect Qwen/Qwen3-Next-80B-A3B-Instruct
    """
    quiet_transformers()
    leave_without_collecting()
    from qkguard.layout import find_attention
    from qkguard.layout.spec_file import dump_specs
    from qkguard.offline.inspect import layout_report

    if write_spec is not None and write_spec.exists():
        raise QKGuardError(f"{write_spec} exists; choose another file, your corrections may be in it")
    specs = find_attention(model, spec=spec, trust_remote_code=trust_remote_code)
    report = layout_report(model, spec=specs, verify=verify, trust_remote_code=trust_remote_code)
    if write_spec is not None:
        write_spec.write_text(dump_specs(specs), encoding="utf-8")
    if as_json:
        print_json(report)
    else:
        warn(report["warnings"])
        _print(report)
    if verify:
        _judge(report["verified"], quiet=as_json)


def _judge(verified: list[dict[str, Any]], *, quiet: bool) -> None:
    """One line for every distinct kind of layer; an error where the layout is wrong."""
    from qkguard.layout.selection import show_layers

    for verdict in verified:
        layers = show_layers(verdict["layers"])
        if verdict["problems"]:
            raise QKGuardError(f"Layers {layers}: the layout is wrong: {'; '.join(verdict['problems'])}")
        if not quiet:
            proven = "the rows move exactly what they should"
            say(f"layers {layers}: {proven}" + "".join(f"; partial: {why}" for why in verdict["partial"]))


def _print(report: dict[str, Any]) -> None:
    from qkguard.layout.selection import show_layers

    kinds = ", ".join(f"{count} {kind}" for kind, count in report["layer_kinds"].items())
    say(f"{report['model']} ({report['model_type'] or 'unknown model type'}): {kinds}")
    alike: dict[str, list[dict[str, Any]]] = {}
    for layer in report["layers"]:
        alike.setdefault(repr(_table_rows(layer)), []).append(layer)
    rows = []
    for layers in alike.values():
        numbers = show_layers((layer["layer"] for layer in layers), most=8)
        rows += [(numbers if i == 0 else "", *cells) for i, cells in enumerate(_table_rows(layers[0]))]
    print_table(["<layers", "<kind", "<heads q/kv x size", "<parameter", "<shape", "<queries and keys"], rows)
    parameters = report["parameters"]
    share = f" ({parameters['share']:.1%} of the model)" if parameters["share"] is not None else ""
    say(
        f"{report['softmax_layers']} softmax-attention layers; queries and keys: {parameters['query_key']:,} "
        f"parameters{share}, {human_bytes(report['bytes'])} in {report['dtype']}"
    )


def _table_rows(layer: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of one layer, a row for each parameter, with {layer} in the place of its number in names."""
    heads = f"{layer['num_heads']}/{layer['num_kv_heads']} x {layer['head_dim']}"
    rows: list[tuple[str, ...]] = []
    for param in layer["params"]:
        first = ("", "") if rows else (layer["kind"], heads)
        name = ".".join("{layer}" if part == str(layer["layer"]) else part for part in param["name"].split("."))
        where = "; ".join(f"{role} {show_ranges(ranges)}" for role, ranges in param["rows"].items())
        shape = "x".join(map(str, param["shape"]))
        rows.append((*first, name, shape, f"{'columns' if param['dim'] else 'rows'} {where}"))
    return rows


def show_ranges(ranges: list[list[int]], most: int = 3) -> str:
    """[[0, 16], [32, 48], ...] -> "0:16, 32:48, 64:80, ... (4 ranges)"."""
    text = ", ".join(f"{lo}:{hi}" for lo, hi in ranges[:most])
    return text if len(ranges) <= most else f"{text}, ... ({len(ranges)} ranges)"
