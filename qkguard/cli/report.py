"""`qkguard report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkguard.cli import options as opt
from qkguard.cli.output import print_json, say
from qkguard.errors import QKGuardError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR [DIR ...]", help="Output folders of guarded runs.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the page that compares several runs goes.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Write the page of a run, or one that compares several.

    A single run's goes to _qkguard/report.html in its folder, pictures beside it; the run writes it by itself when
    training ends. With several runs it goes to --out (compare.html).

    \b
    Examples:
      qkguard report runs/sft
      qkguard report runs/sft runs/sft-low-rate --out compare.html
    """
    from qkguard.report.run import load_run
    from qkguard.report.run_page import write_comparison, write_report
    from qkguard.report.sentences import describe

    if len(runs) == 1 and out is not None:
        raise QKGuardError("--out is for comparing several runs; a single run's page goes to its own _qkguard folder")
    target = write_report(runs[0]) if len(runs) == 1 else write_comparison(runs, out or Path("compare.html"))
    told = {str(folder): describe(load_run(folder)) for folder in runs}
    if as_json:
        print_json({"page": str(target), "runs": told})
        return
    for folder, sentences in told.items():
        if len(told) > 1:
            say(f"{folder}:")
        for sentence in sentences:
            say(sentence)
    say(f"\n{target}")
