"""The wheel: what is in it, and that it works where nothing else of this repository is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import qkguard

ROOT = Path(__file__).parents[2]
LARGEST = 6e6  # bytes: the demo's model is 5 MB of them


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this tree, in this environment."""
    out = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    (found,) = out.glob("qkguard-*.whl")
    return found


@pytest.mark.slow
def test_it_holds_the_package_and_the_recipes_and_not_the_lab_s_results(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "qkguard").rglob("*.py")}
    recipes = {f"qkguard/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*.yaml")}
    assert sources | recipes | {"qkguard/py.typed", "qkguard/demo/model/model.safetensors"} <= names
    assert [name for name in names if "results/" in name or "figures/" in name or name.startswith("tests/")] == []
    assert wheel.stat().st_size < LARGEST


@pytest.mark.slow
def test_it_installs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """With its dependencies from the package index, as `pip install qkguard` does: minutes."""
    venv.create(tmp_path / "venv", with_pip=True)
    python, qkguard_ = (tmp_path / "venv/bin" / name for name in ("python", "qkguard"))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, str(wheel)], check=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    clean["QKGUARD_CACHE"] = str(tmp_path / "cache")

    def called(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    assert called(str(qkguard_), "--version").strip() == f"qkguard {qkguard.__version__}"
    assert "smollm2/cot-sft/full" in called(str(qkguard_), "recipes")
    model = called(str(python), "-c", "import qkguard.demo as d; print(d.MODEL)").strip()
    assert str(tmp_path) in model
    shutil.copytree(model, tmp_path / "tuned")
    called(str(qkguard_), "restore", "--base", model, "--tuned", "tuned", "--out", "out")
    assert "whole" in called(str(qkguard_), "verify", "out", "--load")
    callback = "from qkguard import QKGuardCallback; print(QKGuardCallback().config.method)"
    assert called(str(python), "-c", callback).strip() == "restore"


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["version"] == project["version"] == qkguard.__version__
    assert found["preferred-citation"]["url"].endswith("2606.11052")
