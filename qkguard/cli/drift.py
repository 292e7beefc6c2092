"""`qkguard drift`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qkguard.cli import options as opt
from qkguard.cli.output import (
    leave_without_collecting,
    print_json,
    print_table,
    progress_bar,
    quiet_transformers,
    say,
    warn,
)
from qkguard.report.numbers import number

COLUMNS = ("q_rel", "k_rel", "q_1mcos", "k_1mcos", "routing_rel", "q_top_sv", "k_top_sv")


def drift(
    base: opt.Base,
    tuned: opt.Tuned,
    projections: opt.Projections = "q,k",
    layers: opt.Layers = None,
    include_norms: opt.Norms = False,
    sliding_window: opt.Sliding = True,
    shared: opt.Shared = "keep",
    routing: Annotated[
        bool, typer.Option("--routing/--no-routing", help="Also routing drift and top singular values (slower).")
    ] = True,
    heads: Annotated[bool, typer.Option("--heads", help="Also a table of routing drift per head.")] = False,
    spec: opt.Spec = None,
    trust_remote_code: opt.RemoteCode = False,
    as_json: opt.Json = False,
) -> None:
    """Measure how far SFT moved queries and keys, by layer.

    q_rel and k_rel are |W - W0| / |W0|; 1mcos is 1 - cosine; routing_rel is the same ratio for W_Q^T W_K, averaged
    over heads: what retrieval feels, and what a mere rotation of queries and keys leaves at 0; top_sv is the largest
    singular value of W - W0. JSON has the numbers per tensor and head too.

    \b
    Example:
      qkguard drift --base Qwen/Qwen3-8B --tuned runs/sft/checkpoint-900
    """
    rows = opt.row_selection(layers, include_norms, sliding_window, shared, projections)
    quiet_transformers()
    leave_without_collecting()
    from qkguard.offline.drift_report import drift_report

    with progress_bar("comparing") as progress:
        report = drift_report(
            base,
            tuned,
            routing=routing,
            spec=spec,
            trust_remote_code=trust_remote_code,
            progress=progress,
            **rows,
        )
    if as_json:
        print_json(report)
        return
    warn(report["warnings"])
    columns = [c for c in COLUMNS if c in report["mean"]]
    lines = [
        (str(layer["layer"]), layer["kind"], *(number(layer["drift"].get(c)) for c in columns))
        for layer in report["layers"]
    ]
    lines += [(name, "", *(number(report[name][c]) for c in columns)) for name in ("mean", "max")]
    print_table(["layer", "<kind", *columns], lines)
    if heads:
        _print_heads(report["layers"])


def _print_heads(layers: list[dict[str, Any]]) -> None:
    with_heads = [layer for layer in layers if layer.get("routing_per_head")]
    if not with_heads:
        say("routing drift per head: not defined for these layers")
        return
    count = max(len(layer["routing_per_head"]) for layer in with_heads)
    rows = [(str(layer["layer"]), *(number(v) for v in layer["routing_per_head"])) for layer in with_heads]
    say("")
    print_table(["layer", *(f"head {h}" for h in range(count))], rows, title="routing drift per head")
