"""`qkguard sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkguard.cli import options as opt
from qkguard.cli.output import (
    keep_freed_memory,
    no_loading_bars,
    print_json,
    print_table,
    progress_bar,
    quiet_transformers,
    say,
    threads_sleep,
    warn,
)
from qkguard.layout.rows import RowSelection

if TYPE_CHECKING:
    from qkguard.offline.sweep import SweepReport


def sweep(
    base: opt.Base,
    tuned: opt.Tuned,
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows held out from SFT (JSON lines): prompt and completion or answer, messages, or text. "
            '"none" measures recall alone. Default: rows that the run around --tuned kept of its evaluation set.'
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            "--grid",
            help="Methods, with strengths where others than the usual are wanted: "
            "restore,qk-pro:ridge=0.3/1/3,interpolate:alpha=0.5:align.",
            show_default="restore,restore:layers=retrieval,restore:projections=k,qk-pro,interpolate",
        ),
    ] = None,
    controls: Annotated[
        str, typer.Option(help="Also single projections taken back, as a control: some of q,k,v,o,vo, or all.")
    ] = "",
    each_layer: Annotated[bool, typer.Option("--each-layer", help="Also restore one layer at a time.")] = False,
    attribute: Annotated[
        bool,
        typer.Option(
            "--attribute",
            help="Also swap whole groups of weights (Q and K, V and O, mixers, MLPs, norms and embeddings), to see "
            "which of them lost the recall.",
        ),
    ] = False,
    tolerance: Annotated[
        float, typer.Option(help="Task quality a recommended point may lose: share of accuracy, or nats of loss.")
    ] = 0.02,
    write: Annotated[
        Path | None, typer.Option("--write", "-w", help="Write the recommended checkpoint to this folder.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier restored folder there.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write sweep.json, sweep.html and sweep.png to this folder.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the page with picture and table to this file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the picture of the trade-off to this file.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Context lengths of the probe in tokens.", show_default="512,1K,2K as far as they fit"),
    ] = None,
    depths: opt.Depths = "5",
    samples: opt.Samples = 2,
    tasks: opt.Tasks = "single_2,multikey_1,multikey_2",
    haystack: opt.Haystack = None,
    haystack_per: opt.HaystackPer = "sample",
    mode: opt.Mode = "auto",
    rows: Annotated[int, typer.Option(min=1, help="At most so many rows of the data.")] = 256,
    max_length: Annotated[int, typer.Option(min=1, help="Rows longer than this many tokens are left out.")] = 4096,
    layers: opt.Layers = None,
    include_norms: opt.Norms = False,
    sliding_window: opt.Sliding = True,
    shared: opt.Shared = "keep",
    spec: opt.Spec = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    batch_tokens: opt.BatchTokens = 16384,
    chunk: opt.Chunk = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples and of the intervals.")] = 0,
    trust_remote_code: opt.RemoteCode = False,
    as_json: opt.Json = False,
) -> None:
    """Find the restore that keeps recall and skill.

    Needle recall and task quality of the base, the tuned checkpoint and a grid of restores, swapped into one loaded
    model; which points no other beats, and a recommendation by a stated rule, which may well be to leave the tuned
    checkpoint as it is. With --write, exit code 1 where that is so and nothing was written.

    \b
    Examples:
      qkguard sweep -b Qwen/Qwen3-8B -t runs/sft/checkpoint-900 -o sweep
      qkguard sweep -b base -t tuned --lengths 1K,4K --write restored
    """
    quiet_transformers()
    keep_freed_memory()
    threads_sleep()
    selected = opt.row_selection(layers, include_norms, sliding_window, shared)
    opt.parse_choice("--mode", mode, opt.MODES)
    opt.parse_choice("--haystack-per", haystack_per, opt.HAYSTACK_PER)
    opt.parse_choice("--dtype", dtype, opt.DTYPES)
    from qkguard.offline.checks import check_file, check_samples, check_sweep

    probed = opt.parse_lengths(lengths or "512")
    check_samples(opt.parse_names(tasks), probed, opt.parse_depths(depths), samples, haystack)
    check_file(None if data == "none" else data, "JSON lines, rows held out from SFT")
    check_sweep(
        base,
        tuned,
        methods=methods,
        controls=controls,
        tolerance=tolerance,
        write=write,
        overwrite=overwrite,
        rows=RowSelection.of(selected),
        spec=spec,
    )
    files = _files(out, html, png)
    from qkguard.offline.sweep import sweep as run

    no_loading_bars()
    report = run(
        base,
        tuned,
        data=data,
        methods=methods,
        controls=controls,
        each_layer=each_layer,
        attribute=attribute,
        tolerance=tolerance,
        write=write,
        overwrite=overwrite,
        lengths=None if lengths is None else opt.parse_lengths(lengths),
        depths=opt.parse_depths(depths),
        samples=samples,
        tasks=opt.parse_names(tasks),
        haystack=haystack,
        haystack_per=haystack_per,
        mode=mode,
        seed=seed,
        rows=rows,
        max_length=max_length,
        spec=spec,
        dtype=dtype,
        device=device,
        batch_tokens=batch_tokens,
        chunk=chunk,
        trust_remote_code=trust_remote_code,
        bar=progress_bar,
        **selected,
    )
    written = write is not None and report.recommended.candidate.recommendable
    _write_files(report, files)
    if as_json:
        print_json(report.to_json() | {"written": str(write) if written else None})
    else:
        _show(report, files, write if written else None)
    if write is not None and not written:
        raise typer.Exit(1)


def _files(out: Path | None, html: Path | None, png: Path | None) -> dict[str, list[Path]]:
    """Where the JSON, the page and the picture go, their folders checked before anything is measured."""
    files: dict[str, list[Path]] = {"json": [], "html": [html] if html else [], "png": [png] if png else []}
    for file in (html, png):
        opt.check_file(file)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for kind, found in files.items():
            found.append(out / f"sweep.{kind}")
    return files


def _write_files(report: SweepReport, files: dict[str, list[Path]]) -> None:
    from qkguard.checkpoint.manifest import dump
    from qkguard.offline.sweep_page import html_page, tradeoff_figure
    from qkguard.report.page import themed_png

    for file in files["json"]:
        file.write_text(dump(report.to_json()), encoding="utf-8")
    for file in files["html"]:
        file.write_text(html_page(report), encoding="utf-8")
    for file in files["png"]:
        file.write_bytes(themed_png(tradeoff_figure(report)))


def _show(report: SweepReport, files: dict[str, list[Path]], written: Path | None) -> None:
    from qkguard.choice.verdict import rank_layers
    from qkguard.offline.sweep_page import attribution_table, table

    warn(report.warnings)
    points = table(report)
    print_table([*points.head[:-1], "<"], points.rows)
    for row in rank_layers(report.points)[:5]:
        lost = "" if row["lost"] is None else f", {report.metric} lost {row['lost']:.3f}"
        spread = f"95%: {row['gain_low']:+.3f} to {row['gain_high']:+.3f}"
        say(f"layer {row['layer']} alone: recall {row['gain']:+.3f} ({spread}){lost}")
    if report.attribution is not None:
        groups = attribution_table(report.attribution, report.metric)
        print_table(groups.head, groups.rows, title="groups of weights, taken back alone and left from SFT alone")
        for sentence in report.attribution.words:
            say(sentence)
    if report.retrieval is not None and report.retrieval.layers is not None:
        say(report.retrieval.words)
    for sentence in report.words:
        say(sentence)
    say(f"rule: {report.rule}")
    paths = [str(path) for found in files.values() for path in found]
    if paths:
        say(f"wrote {', '.join(paths)}")
    if written is not None:
        say(f"wrote {written}; next: qkguard verify {written}")
