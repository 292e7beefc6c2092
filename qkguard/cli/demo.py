"""`qkguard demo`."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from qkguard.cli import options as opt
from qkguard.cli.output import no_loading_bars, print_json, print_table, progress_bar, quiet_transformers, say
from qkguard.errors import QKGuardError


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write; an earlier demo there is replaced.")
    ] = Path("qkguard-demo"),
    steps: Annotated[int, typer.Option(help="SFT steps.")] = 180,
    seed: Annotated[int, typer.Option(help="Seed of training data, order and probes.")] = 0,
    as_json: opt.Json = False,
) -> None:
    """Show the whole guard on a small hybrid of its own.

    Chain-of-thought SFT on generated arithmetic through TRL's SFTTrainer with QKGuardCallback, as in a script of your
    own; then needle recall and CoT accuracy before SFT, after it, and with queries and keys restored. What it prints
    is what it measured.

    \b
    Example:
      qkguard demo --out my-demo
    """
    if steps < 1:
        raise QKGuardError(f"Invalid --steps {steps}: expected a whole number >= 1.")
    began = time.monotonic()
    tell = partial(print, file=sys.stderr) if as_json else say
    _quiet()
    tell("qkguard demo: what chain-of-thought SFT does to a small hybrid's long-range recall, and what restoring does")
    from qkguard.demo import MODEL, DemoSettings, run_demo

    report = run_demo(
        out,
        DemoSettings(steps=steps, seed=seed),
        watch=progress_bar,
        say=tell,
    )
    if as_json:
        print_json(report.to_json())
        return
    from qkguard.demo.show import reading, table

    drift = report.drift
    say(
        f"\nfinal drift: Q {drift['qkguard/drift/q_rel']:.2f}, K {drift['qkguard/drift/k_rel']:.2f}, "
        f"routing {drift['qkguard/drift/routing_rel']:.2f} (relative to before SFT, mean of the softmax layers)\n"
    )
    print_table(*table(report.scores))
    say(f"\n{reading(report.scores)}\n")
    say(f"drift curves            {report.picture}")
    say(f"raw checkpoint          {report.raw}")
    say(f"restored checkpoint     {report.restored}")
    say(f"problems of the exam    {report.heldout}")
    say(f"done in {time.monotonic() - began:.0f} s\n")
    say("Next, prove that the restored checkpoint differs from the raw one in queries and keys alone:\n")
    say(f"    qkguard verify --full {shlex.quote(str(report.restored))}\n")
    say("measure which restore keeps recall and skill on this run:\n")
    pair = f"--base {shlex.quote(str(MODEL))} --tuned {shlex.quote(str(report.raw))}"
    say(f"    qkguard sweep {pair} --data {shlex.quote(str(report.heldout))} --lengths 256,1K,2K\n")
    say("and in your own SFT script:\n")
    say("    from qkguard import QKGuardCallback")
    say("    trainer = SFTTrainer(..., callbacks=[QKGuardCallback()])")


def _quiet() -> None:
    """Only the demo's own lines, the guard's, and errors."""
    quiet_transformers()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed, where installed, otherwise warns that it is one
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    from datasets import disable_progress_bars

    disable_progress_bars()
    no_loading_bars()
