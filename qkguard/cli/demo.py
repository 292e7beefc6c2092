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
from qkguard.demo.settings import DemoSettings
from qkguard.errors import QKGuardError


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write; an earlier demo there is replaced.")
    ] = Path("qkguard-demo"),
    steps: Annotated[int, typer.Option(help="SFT steps.")] = DemoSettings.steps,
    seed: Annotated[int, typer.Option(help="Seed of training data, order and exam.")] = 0,
    gpu: Annotated[bool, typer.Option("--gpu", help="Train on the GPU.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Send the run to Weights & Biases.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Show the whole guard on a small hybrid of its own.

    Chain-of-thought SFT on generated arithmetic through TRL's SFTTrainer with QKGuardCallback, as in a script of your
    own, which probes recall and ends with a verdict; then an exam before SFT, after it and restored. What it prints
    is what it measured. The base was chosen for the effect, and its queries and keys are rescaled for it.

    \b
    Examples:
      qkguard demo --out my-demo
      qkguard demo --gpu --wandb
    """
    if steps < 1:
        raise QKGuardError(f"Invalid --steps {steps}: expected a whole number >= 1.")
    began = time.monotonic()
    tell = partial(print, file=sys.stderr) if as_json else say
    _quiet(gpu)
    from qkguard.demo import run_demo

    settings = DemoSettings(steps=steps, seed=seed, gpu=gpu, wandb=wandb)
    tell(
        "qkguard demo: what chain-of-thought SFT does to a small hybrid's long-range recall, and what the guard does\n"
        "The base is chosen for the effect: in the head that finds needles, queries are multiplied by "
        f"{settings.factor:g} and keys divided by it.\n"
        "It computes the same, but AdamW moves keys so small far at every step. Bases as grown: recipes/amnesia-lab."
    )
    report = run_demo(out, settings, watch=progress_bar, say=tell)
    if as_json:
        print_json(report.to_json())
        return
    from qkguard.demo.show import curve, table

    say(f"\n{curve(report.run)}\n")
    print_table(*table(report.scores))
    say(f"\nThe verdict: {' '.join(report.verdict['words'])}\n")
    say(f"done in {time.monotonic() - began:.0f} s. {report.files['picture']} is the picture.\n")
    say("Next: open the run's page; restore two checkpoints of your own; add one line to your SFT script:\n")
    say(f"    {shlex.quote(str(report.files['page']))}")
    say("    qkguard restore --base BASE --tuned TUNED --out RESTORED")
    say("    trainer = SFTTrainer(..., callbacks=[QKGuardCallback()])  # from qkguard import QKGuardCallback")


def _quiet(gpu: bool) -> None:
    """Only the demo's own lines, the guard's warnings, and errors."""
    quiet_transformers()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed, where installed, otherwise warns that it is one
    os.environ.setdefault("WANDB_PROJECT", "qkguard-demo")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    guard = logging.getLogger("qkguard")
    if not guard.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[qkguard] %(message)s"))
        guard.addHandler(handler)
    guard.setLevel(logging.WARNING)  # the alert; the verdict is printed below the table
    guard.propagate = False
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    from datasets import disable_progress_bars

    disable_progress_bars()
    no_loading_bars()
