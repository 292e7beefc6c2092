"""`qkguard verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkguard.cli import options as opt
from qkguard.cli.output import leave_without_collecting, print_json, say, warn
from qkguard.report.numbers import human_bytes


def verify(
    folder: Annotated[Path, typer.Argument(help="A restored checkpoint (with its qkguard.json).")],
    raw: Annotated[bool, typer.Option("--raw/--no-raw", help="Also check the raw checkpoint it came from.")] = True,
    full: Annotated[
        bool, typer.Option("--full", help="Compare every byte outside the restored rows with the raw files.")
    ] = False,
    load: Annotated[
        bool,
        typer.Option(
            "--load",
            help="Also load it as from_pretrained does, without weights: every parameter must find its tensor.",
        ),
    ] = False,
    trust_remote_code: opt.RemoteCode = False,
    as_json: opt.Json = False,
) -> None:
    """Check that a restored checkpoint is whole and as recorded.

    Recomputes the hashes of all restored rows, file sizes, headers and sampled bytes, here and in the raw checkpoint,
    where that is still in its place. Exit code 0 only if everything agrees.

    \b
    Example:
      qkguard verify runs/sft/checkpoint-900/qk_restored --load
    """
    leave_without_collecting()
    from qkguard.offline.verify import verify as check

    report = check(folder, raw=raw, full=full, load=load, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(report)
        return
    warn(report["warnings"])
    say(
        f"{folder}: whole; {report['tensors']} tensors of {report['layers']} layers "
        f"({human_bytes(report['restored_bytes'])}) as recorded, method {report['method']}, base {report['base']}"
    )
    say(f"raw checkpoint: {report['raw']}; compared: {report['compared']}")
    if load:
        say(f"loads: each of the {report['loads']} parameters finds its tensor")
