"""`qkguard restore`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from qkguard.cli import options as opt
from qkguard.cli.output import (
    drifts,
    leave_without_collecting,
    progress_bar,
    quiet_transformers,
    show_written,
    weight_size,
)
from qkguard.report.numbers import number, plural


def restore(
    base: opt.Base,
    tuned: opt.Tuned,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    method: opt.Method = "restore",
    ridge: opt.Ridge = 10.0,
    alpha: opt.Alpha = 1.0,
    align: opt.Align = False,
    per_layer: opt.PerLayer = None,
    projections: opt.Projections = "q,k",
    layers: Annotated[
        str | None,
        typer.Option(
            help='Decoder layers, counted from 0: 3,7,11 or 0-15. "retrieval": those that the guarded run around '
            "--tuned chose. Default: every softmax layer."
        ),
    ] = None,
    include_norms: opt.Norms = False,
    sliding_window: opt.Sliding = True,
    shared: opt.Shared = "keep",
    spec: opt.Spec = None,
    device: Annotated[str, typer.Option(help="Where the arithmetic runs: cpu or cuda.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier restored folder at OUT.")] = False,
    carry_missing: Annotated[
        bool,
        typer.Option(
            "--carry-missing",
            help="Also copy tensors that the base has and the tuned checkpoint lost (multi-token prediction).",
        ),
    ] = False,
    trust_remote_code: opt.RemoteCode = False,
    as_json: opt.Json = False,
) -> None:
    """Write the tuned checkpoint with the base's queries and keys.

    Only the query and key rows of softmax-attention layers change; every other byte stays as tuned. Shards without
    such rows are hard-linked, the others copied and patched, so memory stays small whatever the model's size.
    OUT appears complete or not at all, and loads with from_pretrained.

    Methods: restore takes queries and keys back whole. qk-pro takes keys back and as much of the queries as routing
    needs (--ridge). interpolate goes part of the way (--alpha, --align). procrustes is restore through rotated
    heads. Which one keeps recall and skill is a matter of the run: measure with qkguard sweep.

    \b
    Examples:
      qkguard restore -b Qwen/Qwen3-8B -t runs/sft/checkpoint-900 -o restored
      qkguard restore -b base -t tuned -o half --method interpolate --alpha 0.5
    """
    rows = opt.row_selection(layers, include_norms, sliding_window, shared, projections, retrieval=True)
    quiet_transformers()
    leave_without_collecting()
    from qkguard.offline.restore import restore_checkpoint

    with progress_bar("restoring", in_bytes=True) as progress:
        manifest = restore_checkpoint(
            base,
            tuned,
            out,
            method=method,
            ridge=ridge,
            alpha=alpha,
            align=align,
            per_layer=opt.parse_per_layer(per_layer),
            spec=spec,
            device=device,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            carry_missing=carry_missing,
            progress=progress,
            **rows,
        )
    show_written(out, manifest, _sentences(out, manifest, method), as_json=as_json)


def _sentences(out: Path, manifest: dict[str, Any], method: str) -> Iterator[str]:
    restored, made = manifest["layers"], [file["made"] for file in manifest["files"].values()]
    yield (
        f"{out}: {len(manifest['tensors'])} tensors of {len(restored)} softmax-attention layers restored; "
        f"{len(made)} weight files ({weight_size(manifest)}, {made.count('linked')} linked)"
    )
    carried = manifest.get("carried", ())
    if carried:
        count, first = plural(len(carried), "tensor"), carried[0]["name"]
        yield f"{count} of the base carried over that the tuned checkpoint lacks, first {first}"
    said = "drift taken back" if method == "restore" else "drift by SFT"
    for name, drift in drifts(restored):
        yield f"{said}, {name}: {drift} of the norm before SFT"
    for role, name in (("q", "queries"), ("k", "keys")):
        found = [
            [layer["distance"][key] for layer in restored if key in layer.get("distance", {})]
            for key in (f"{role}_from_before", f"{role}_from_tuned")
        ]
        if all(found):
            before, after = (number(fmean(values)) for values in found)
            yield f"{method}, {name} written: mean distance {before} from before SFT, {after} from the tuned ones"
