"""`qkguard merge`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from qkguard.cli import options as opt
from qkguard.cli.output import (
    drifts,
    keep_freed_memory,
    leave_without_collecting,
    progress_bar,
    quiet_transformers,
    show_written,
    threads_sleep,
    weight_size,
)


def merge(
    base: Annotated[str, typer.Option("--base", "-b", help="Base model of the adapter: a folder or a hub id.")],
    adapter: Annotated[str, typer.Option("--adapter", "-a", help="LoRA adapter: a folder or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    keep_qk: Annotated[bool, typer.Option("--keep-qk", help="Merge queries and keys too, as PEFT does.")] = False,
    alpha: Annotated[
        float,
        typer.Option(help="How far queries and keys go back to the base: 1 leaves their adapters out, 0 merges them."),
    ] = 1.0,
    projections: opt.Projections = "q,k",
    layers: opt.Layers = None,
    sliding_window: opt.Sliding = True,
    shared: opt.Shared = "keep",
    spec: opt.Spec = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier folder at OUT.")] = False,
    trust_remote_code: opt.RemoteCode = False,
    as_json: opt.Json = False,
) -> None:
    """Merge a LoRA adapter without its queries and keys.

    Everything merged has the bits of PEFT's own merge; the query and key rows of softmax-attention layers have the
    base's. The base is read a tensor at a time, so memory stays at the largest one. OUT appears complete or not at
    all, and loads with from_pretrained.

    \b
    Example:
      qkguard merge -b Qwen/Qwen3-8B -a runs/sft/checkpoint-900 -o merged
    """
    rows = opt.row_selection(layers, False, sliding_window, shared, projections)
    quiet_transformers()
    leave_without_collecting()
    keep_freed_memory()
    threads_sleep()
    from qkguard.offline.merge import merge_adapter

    with progress_bar("merging", in_bytes=True) as progress:
        manifest = merge_adapter(
            base,
            adapter,
            out,
            keep_qk=keep_qk,
            alpha=alpha,
            spec=spec,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            progress=progress,
            **rows,
        )
    what = "merged too" if keep_qk else "left out" if alpha == 1 else f"merged with {1 - alpha:g} of their scaling"
    show_written(out, manifest, _sentences(out, manifest, what), as_json=as_json)


def _sentences(out: Path, manifest: dict[str, Any], what: str) -> Iterator[str]:
    adapted = [layer for layer in manifest["layers"] if layer["adapted"]]
    yield (
        f"{out}: {len(manifest['tensors'])} tensors merged ({weight_size(manifest)}); the adapters on queries and "
        f"keys of {len(adapted)} of {len(manifest['layers'])} softmax-attention layers {what}"
    )
    for name, drift in drifts(adapted):
        yield f"the whole adapter moves {name} by: {drift} of the base's norm"
