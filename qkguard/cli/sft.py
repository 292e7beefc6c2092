"""`qkguard sft`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from qkguard.cli.output import no_loading_bars, print_json, progress_bar, say, warn
from qkguard.errors import QKGuardError

if TYPE_CHECKING:
    from qkguard.sft.launch import Launch

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def sft(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="A recipe: a YAML file, or a bundled one by name.")
    ] = None,
    accelerate: Annotated[
        str | None,
        typer.Option(help="Start ranks: zero1, zero2, zero3, fsdp2, ddp, single, or an accelerate config file."),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num-processes", "--num_processes", min=1, help="Ranks on this node. Default: every accelerator."
        ),
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", "--num_machines", min=1, help="Nodes that train together.")] = 1,
    node_rank: Annotated[int, typer.Option("--node-rank", "--machine_rank", help="This node's number, from 0.")] = 0,
    main_ip: Annotated[
        str | None, typer.Option("--main-process-ip", "--main_process_ip", help="The first node's address.")
    ] = None,
    main_port: Annotated[
        int | None, typer.Option("--main-process-port", "--main_process_port", help="Its port. Default: 29500.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything and print the plan; load no weights without --diagnose."),
    ] = False,
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose",
            help="With --dry-run: load the model and measure how near the data makes its attention look.",
        ),
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="With --diagnose: ordinary text to compare with (.txt, .md, JSON lines).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print the plan as JSON.")] = False,
) -> None:
    """Chain-of-thought SFT from a recipe, under guard.

    Every key of the recipe can be overridden: --learning_rate 1e-5, --qkguard.probe_steps 0.05. Keys are those of
    TRL's SFTConfig and ModelConfig, of the data (dataset_name, datasets, *_column, ...) and, in the section qkguard,
    of QKGuardConfig. A key that nothing reads is an error.

    \b
    Examples:
      qkguard sft --config qwen3/cot-sft/full --dry-run
      qkguard sft --config qwen3/cot-sft/full --accelerate zero3
    """
    if as_json and not dry_run:
        raise QKGuardError("--json prints the plan of --dry-run; add --dry-run.")
    if (diagnose and not dry_run) or (against is not None and not diagnose):
        raise QKGuardError("--diagnose measures before a training, and --against is for it: add --dry-run --diagnose.")
    if accelerate is None and (num_processes is not None or nodes > 1):
        raise QKGuardError(
            "--num-processes and --nodes start ranks through accelerate; add --accelerate zero3 (or another config)."
        )
    _quiet()
    from qkguard.sft.keys import check_settings
    from qkguard.sft.launch import Launch
    from qkguard.sft.recipes import find_recipe

    recipe = find_recipe(config) if config else None
    with _unheard():
        check_settings(context.args, recipe)  # in a second; what follows imports TRL
    start = Launch(accelerate, num_processes, nodes, node_rank, main_ip, main_port) if accelerate else None
    if dry_run:
        _print_plan(context.args, recipe, start, as_json, diagnose, against)
    elif start is not None:
        _launch(context.args, recipe, start)
    else:
        _train(context.args, recipe)


def _print_plan(
    arguments: list[str],
    recipe: Path | None,
    start: Launch | None,
    as_json: bool,
    diagnose: bool,
    against: Path | None,
) -> None:
    from qkguard.cli.diagnose import show
    from qkguard.sft.arguments import parse
    from qkguard.sft.launch import ranks_per_node
    from qkguard.sft.plan import describe, plan
    from qkguard.sft.preflight import preflight

    settings = parse(arguments, recipe)
    processes = ranks_per_node(start) * start.nodes if start else 1
    checked = preflight(settings)
    found = plan(settings, checked, accelerate=start.config if start else None, processes=processes)
    diagnosis = None
    if diagnose:
        from qkguard.sft.diagnosis import diagnose_training

        no_loading_bars()
        diagnosis = diagnose_training(settings, checked, against, progress_bar)
    if as_json:
        print_json(found if diagnosis is None else found | {"diagnosis": diagnosis.to_json()})
        return
    warn(found["warnings"])
    say(f"{describe(found)}\n")
    if diagnosis is not None:
        show(diagnosis)
    say("Nothing was trained. Leave out --dry-run to start.")


def _launch(arguments: list[str], recipe: Path | None, start: Launch) -> NoReturn:
    """Check everything here, in one line instead of a traceback from every rank; then become `accelerate launch`."""
    from qkguard.sft.arguments import parse
    from qkguard.sft.launch import devices, launch_command, ranks_per_node
    from qkguard.sft.preflight import preflight

    ranks_per_node(start)  # needs no recipe, so it comes before what does
    with _unheard():
        settings = parse(arguments, recipe)
    precision = "bf16" if settings.training.bf16 else "fp16" if settings.training.fp16 else "no"
    forwarded = [*(["--config", str(recipe)] if recipe else []), *arguments]
    command, environment = launch_command(start, forwarded, precision)
    preflight(settings)
    if start.name == "fsdp2" and not devices():
        warn(["FSDP2 shards on accelerators only: on CPUs accelerate trains these processes as DDP"])
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


def _train(arguments: list[str], recipe: Path | None) -> None:
    from qkguard.sft.arguments import parse
    from qkguard.sft.train import train

    final = train(parse(arguments, recipe))
    if final is not None and int(os.environ.get("RANK", "0")) == 0:
        say(f"done; next: qkguard verify {final}")


@contextmanager
def _unheard() -> Iterator[None]:
    """Settings are read again later, by TRL's parser or by rank 0, which then warns of old names: once is enough."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _quiet() -> None:
    """Leave out what users can do nothing about: deprecations inside libraries, bars in a log file."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # for when it is imported
        if "datasets" in sys.modules:
            sys.modules["datasets"].disable_progress_bars()
