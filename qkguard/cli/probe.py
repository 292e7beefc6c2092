"""`qkguard probe`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkguard.cli import options as opt
from qkguard.cli.output import no_loading_bars, print_json, print_table, progress_bar, quiet_transformers, say, warn
from qkguard.probe.words import change_in_points
from qkguard.report.numbers import number

if TYPE_CHECKING:
    from qkguard.offline.probe import ModelReport


def probe(
    models: Annotated[list[str], typer.Argument(help="Folders or hub ids, probed side by side on the same samples.")],
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, e.g. 512,4096,32K.")] = "512,1K,2K,4K",
    depths: opt.Depths = "5",
    samples: opt.Samples = 2,
    tasks: opt.Tasks = "single_2,multikey_1,multikey_2",
    haystack: opt.Haystack = None,
    haystack_per: opt.HaystackPer = "sample",
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    mode: opt.Mode = "auto",
    generate: Annotated[
        bool, typer.Option("--generate", help="Also RULER's own generation and metric (slower).")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Generate on these prompts instead: JSON lines as RULER or lm-evaluation-harness write them."
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate with --generate or --prompts.")] = 128,
    attention: Annotated[
        bool, typer.Option("--attention/--no-attention", help="Attention mass on needle and recent tokens.")
    ] = True,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    batch_tokens: opt.BatchTokens = 16384,
    chunk: opt.Chunk = None,
    png: Annotated[Path | None, typer.Option(help="Write the heatmap length x depth to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with tables and heatmaps to this file.")] = None,
    trust_remote_code: opt.RemoteCode = False,
    as_json: opt.Json = False,
) -> None:
    """Measure needle-in-a-haystack recall of models.

    The tasks are RULER's, decided by one forward pass per sample. A sample counts as right if and only if greedy
    decoding would begin with the true answer. Of several models each is compared with the first, on the same samples.

    \b
    Example:
      qkguard probe Qwen/Qwen3-8B runs/sft/checkpoint-900 --lengths 4K,32K
    """
    quiet_transformers()
    for file in (png, html):
        opt.check_file(file)
    opt.parse_choice("--mode", mode, opt.MODES)
    opt.parse_choice("--haystack-per", haystack_per, opt.HAYSTACK_PER)
    opt.parse_choice("--dtype", dtype, opt.DTYPES)
    from qkguard.offline.checks import check_file, check_models, check_samples

    check_samples(opt.parse_names(tasks), opt.parse_lengths(lengths), opt.parse_depths(depths), samples, haystack)
    check_file(prompts, "prompts as RULER or lm-evaluation-harness write them")
    check_models(models)
    from qkguard.offline.models import LoadOptions
    from qkguard.offline.probe import answer_file, probe_models, to_json
    from qkguard.probe import ProbeSettings

    no_loading_bars()
    settings = ProbeSettings(
        lengths=opt.parse_lengths(lengths),
        depths=opt.parse_depths(depths),
        samples=samples,
        tasks=opt.parse_names(tasks),
        haystack=haystack,
        haystack_per=haystack_per,
        seed=seed,
        mode=opt.parse_choice("--mode", mode, opt.MODES),
        attention=attention,
        batch_tokens=batch_tokens,
        chunk=chunk,
    )
    load = LoadOptions(dtype, device, trust_remote_code)
    if prompts is not None:
        answers = answer_file(models, prompts, settings.mode, load, new_tokens=new_tokens, bar=progress_bar)
        _show_answers(answers, as_json)
        return
    reports = probe_models(models, settings, load, new_tokens=new_tokens if generate else None, bar=progress_bar)
    if png is not None or html is not None:
        _write_files(reports, png, html)
    if as_json:
        print_json(to_json(reports))
        return
    warn(w for report in reports for w in report.warnings)
    _show(reports)


def _write_files(reports: list[ModelReport], png: Path | None, html: Path | None) -> None:
    from qkguard.offline.probe_page import heatmap_png, html_page

    if png is not None:
        png.write_bytes(heatmap_png(reports))
    if html is not None:
        html.write_text(html_page(reports), encoding="utf-8")


def _show(reports: list[ModelReport]) -> None:
    from qkguard.offline.probe import drop_since_first

    groups = [r.result.by("task", "length") for r in reports]
    rows = [(task, str(length), *(f"{g[task, length].recall:.1%}" for g in groups)) for task, length in groups[0]]
    rows.append(("all", "", *(f"{r.result.recall:.1%}" for r in reports)))
    rows.append(("answer log-probability", "", *(number(r.result.answer_logprob) for r in reports)))
    for kind, label in (("needle", "strongest head on the needle"), ("local", "attention on recent tokens, mean")):
        masses = [r.result.attention for r in reports]
        if any(masses):
            values = [None if m is None else m.strongest() if kind == "needle" else m.mean("local") for m in masses]
            rows.append((label, "", *(number(v) for v in values)))
    if any(r.result.generated for r in reports):
        rows.append(("RULER's match (generated)", "", *(f"{r.result.generated['recall']:.1%}" for r in reports)))
    print_table(["task", "length", *(r.name for r in reports)], rows)
    for report in reports:
        drop = drop_since_first(reports, report)
        if drop is not None:
            change = {"value": -drop["drop"], "low": -drop["high"], "high": -drop["low"], "count": drop["count"]}
            say(f"{report.name} against {reports[0].name}: {change_in_points(change)}")
        told = report.result.generated
        if told:
            say(
                f"{report.name}: {told['found_otherwise']} samples right by RULER's match alone, "
                f"{told['contradicted']} by teacher forcing alone"
            )


def _show_answers(answers: dict[str, Any], as_json: bool) -> None:
    scores = {name: sum(row["score"] for row in rows) / len(rows) for name, rows in answers.items()}
    if as_json:
        print_json({"models": [{"name": n, "recall": scores[n], "answers": rows} for n, rows in answers.items()]})
        return
    print_table(
        ["model", "prompts", "RULER's match"], [(n, str(len(answers[n])), f"{s:.1%}") for n, s in scores.items()]
    )
