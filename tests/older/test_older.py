"""The oldest supported versions, those of pyproject.toml, in an interpreter of its own.

    python -m venv older
    older/bin/pip install 'torch==2.11.*' 'transformers==5.17.*' 'trl==1.10.*' 'peft==0.18.*' 'accelerate==1.10.*' \
        'datasets==4.7.*' matplotlib typer pytest pytest-timeout scipy tensorboard psutil
    QKGUARD_OLDER_PYTHON=older/bin/python python -m pytest -m older tests/older
"""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
FILES = ["test_callback.py", "test_spec.py", "test_drift.py", "test_sharding.py"]


@pytest.mark.older
def test_the_callback_on_the_oldest_supported_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(line.split(">=") for line in project["dependencies"])
    python = os.environ.get("QKGUARD_OLDER_PYTHON")
    if not python:
        pytest.skip("QKGUARD_OLDER_PYTHON names no interpreter with the oldest supported versions")
    show = f"from importlib.metadata import version; print(*map(version, {PACKAGES}))"
    found = subprocess.run([python, "-c", show], capture_output=True, text=True, check=True).stdout.split()
    newer = [(p, v) for p, v in zip(PACKAGES, found, strict=True) if not f"{v}.".startswith(f"{bounds[p]}.")]
    assert not newer, f"not the oldest supported: {newer}"
    command = [python, "-m", "pytest", "-o", "addopts=", "-q", "-k", "not wandb"]
    command += [str(ROOT / "tests" / "unit" / name) for name in FILES]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
