"""The oldest supported set (torch 2.11, transformers 5.17), in an interpreter of its own.

    QKGUARD_OLDER_PYTHON=/path/to/python python -m pytest -m older tests/older

The interpreter needs that torch and transformers, and trl, peft, accelerate, datasets and pytest-timeout as pinned.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ["test_callback.py", "test_spec.py", "test_drift.py", "test_sharding.py"]


@pytest.mark.older
def test_the_callback_on_the_oldest_supported_versions():
    python = os.environ.get("QKGUARD_OLDER_PYTHON")
    if not python:
        pytest.skip("QKGUARD_OLDER_PYTHON names no interpreter with torch 2.11 and transformers 5.17")
    show = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    found = subprocess.run([python, "-c", show], capture_output=True, text=True, check=True).stdout.split()
    assert found[0].startswith("2.11") and found[1].startswith("5.17"), found
    command = [python, "-m", "pytest", "-o", "addopts=", "-q", "-k", "not wandb"]
    command += [str(ROOT / "tests" / "unit" / name) for name in FILES]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
