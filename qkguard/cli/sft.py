"""`qkguard sft`."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from qkguard.cli.output import print_json, say, warn
from qkguard.errors import QKGuardError

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
        bool, typer.Option("--dry-run", help="Load no weights: check everything and print the plan.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print the plan as JSON.")] = False,
) -> None:
    """Chain-of-thought SFT from a recipe, under guard.

    Every key of the recipe can be overridden: --learning_rate 1e-5, --qkguard.probe_steps 0.05. Keys are those of
    TRL's SFTConfig and ModelConfig, of the data (dataset_name, datasets, *_column, ...) and, in the section qkguard,
    of QKGuardConfig. A key that nothing reads is an error.

    Example: qkguard sft --config qwen3/cot-sft/full --accelerate zero3 --output_dir runs/first
    """
    if as_json and not dry_run:
        raise QKGuardError("--json prints the plan of --dry-run; add it")
    _quiet()
    from qkguard.sft.arguments import parse
    from qkguard.sft.launch import Launch, devices, launch_command, ranks_per_node
    from qkguard.sft.recipes import find_recipe

    recipe = find_recipe(config) if config else None
    start = Launch(accelerate, num_processes, nodes, node_rank, main_ip, main_port) if accelerate else None
    if start is None and (num_processes is not None or nodes > 1):
        raise QKGuardError(
            "--num-processes and --nodes start ranks through accelerate; add --accelerate zero3 (or ...)"
        )
    if dry_run:
        from qkguard.sft.plan import plan
        from qkguard.sft.preflight import preflight

        settings = parse(context.args, recipe)
        processes = ranks_per_node(start) * nodes if start else 1
        found = plan(settings, preflight(settings), accelerate=accelerate, processes=processes)
        if as_json:
            print_json(found)
        else:
            from qkguard.sft.plan_text import lines

            warn(found["warnings"])
            for label, text in lines(found):
                say(f"{label:<12}{text}")
            say("\nnothing was trained; drop --dry-run to start")
        return
    if start is not None:
        from qkguard.sft.preflight import preflight

        ranks_per_node(start)  # what is wrong here needs no recipe to be seen
        settings = parse(context.args, recipe)
        precision = "bf16" if settings.training.bf16 else "fp16" if settings.training.fp16 else "no"
        forwarded = [*(["--config", str(recipe)] if recipe else []), *context.args]
        command, environment = launch_command(start, forwarded, precision)
        preflight(settings)  # one line here instead of a traceback from every rank
        if start.name == "fsdp2" and not devices():
            warn(["FSDP2 shards on accelerators only: on CPUs accelerate trains these processes as DDP"])
        sys.stdout.flush()
        os.execvpe(command[0], command, environment)
    settings = parse(context.args, recipe)
    from qkguard.sft.train import train

    final = train(settings)
    if final is not None and int(os.environ.get("RANK", "0")) == 0:
        say(f"done; next: qkguard verify {final}")


def _quiet() -> None:
    """Leave out what users can do nothing about: deprecations inside libraries, bars in a log file."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        from datasets import disable_progress_bars

        disable_progress_bars()
