"""Importing the guard costs little beside what it is imported into, and the command line starts without torch."""

from __future__ import annotations

import os
import subprocess
import sys

CALLBACK = """
import sys, time
from transformers import TrainerCallback
before = set(sys.modules)
began = time.process_time()
from qkguard import QKGuardCallback
print(time.process_time() - began, *set(sys.modules) - before)
"""
CLI = """
import sys, time
began = time.process_time()
import qkguard.cli
print(time.process_time() - began, *sys.modules)
"""


def imported(code: str) -> tuple[float, set[str]]:
    """Processor seconds of an import, the best of three, and the modules it brought."""
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
        seconds, *modules = done.stdout.split()
        runs.append((float(seconds), set(modules)))
    return min(runs, key=lambda run: run[0])


def test_the_callback_adds_little_to_transformers() -> None:
    seconds, modules = imported(CALLBACK)
    assert seconds < 1, "0.13 s where this was written; 0.3 s is what it may take on a quiet machine"
    assert not modules & {"pydantic", "matplotlib", "peft", "trl", "datasets", "jinja2"}


def test_the_command_line_starts_without_torch() -> None:
    seconds, modules = imported(CLI)
    assert seconds < 1 and not modules & {"torch", "transformers", "datasets", "pydantic", "matplotlib"}
