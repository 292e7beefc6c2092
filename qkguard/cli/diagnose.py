"""`qkguard diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkguard.cli import options as opt
from qkguard.cli.output import no_loading_bars, print_json, print_table, progress_bar, quiet_transformers, say, warn

if TYPE_CHECKING:
    from qkguard.offline.diagnose import Diagnosis


def diagnose(
    model: Annotated[str, typer.Option("--model", "-m", help="The model to be trained: a folder or a hub id.")],
    data: Annotated[
        Path,
        typer.Option(
            "--data", "-d", help="What it is to be trained on: JSON lines of prompt and completion, messages or text."
        ),
    ],
    against: Annotated[
        Path | None, typer.Option(help="Ordinary text to compare with: .txt, .md, or JSON lines of text.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="At most so many rows, from everywhere in the data.")] = 32,
    max_length: Annotated[int, typer.Option(min=2, help="Rows are cut at this many tokens, as in training.")] = 2048,
    far: Annotated[int, typer.Option(min=0, help="Keys more than this many tokens back count as far.")] = 128,
    heads: Annotated[
        bool, typer.Option("--heads/--no-heads", help="Also probe which heads find needles, and compare.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of the intervals and of the probe.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 on an accelerator, float32 on a CPU), float32, bfloat16 or float16.")
    ] = "auto",
    device: opt.Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for diagnosis.json, .html and .png.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the two curves to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with curves and tables to this file.")] = None,
    trust_remote_code: opt.RemoteCode = False,
    as_json: opt.Json = False,
) -> None:
    """Measure how near the data makes attention look.

    How far the text resembles itself (W_corr), how far the loss's gradient on attention logits reaches (W_grad), how
    much of the gradient of W_Q and W_K comes from far tokens, and how much falls on the heads that find needles.
    Numbers with intervals, not a forecast.

    \b
    Example:
      qkguard diagnose -m Qwen/Qwen3-8B -d cot.jsonl --against prose.txt
    """
    quiet_transformers()
    opt.parse_choice("--dtype", dtype, opt.DTYPES)
    for file in (png, html):
        opt.check_file(file)
    from qkguard.offline.checks import check_file, check_models

    check_file(data, "JSON lines or text, what is to be trained on")
    check_file(against, "text to compare with")
    check_models([model])
    from qkguard.offline.diagnose import diagnose as run

    no_loading_bars()
    found = run(
        model,
        data,
        against=against,
        rows=rows,
        max_length=max_length,
        far=far,
        heads=heads,
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        bar=progress_bar,
    )
    _write_files(found, out, png, html)
    if as_json:
        print_json(found.to_json())
    else:
        show(found)


def show(found: Diagnosis) -> None:
    """The table and the sentences on stdout, warnings on stderr."""
    from qkguard.offline.diagnose_page import heads_table, layer_table, sentences

    warn(found.warnings)
    for table in (layer_table(found), heads_table(found)):
        if table is not None:
            print_table(table.head, table.rows)
    for sentence in sentences(found):
        say(sentence)


def _write_files(found: Diagnosis, out: Path | None, png: Path | None, html: Path | None) -> None:
    from qkguard.checkpoint.manifest import dump
    from qkguard.offline.diagnose_page import curves_figure, html_page
    from qkguard.report.page import themed_png

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "diagnosis.json").write_text(dump(found.to_json()), encoding="utf-8")
    for file in (html, out and out / "diagnosis.html"):
        if file is not None:
            file.write_text(html_page(found), encoding="utf-8")
    for file in (png, out and out / "diagnosis.png"):
        if file is not None:
            file.write_bytes(themed_png(curves_figure(found)))
