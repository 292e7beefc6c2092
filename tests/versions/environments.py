"""The oldest and the newest versions that the guard works with, in environments of their own, and the tests there.

    python tests/versions/environments.py oldest     # `make test-oldest`: the versions of constraints-oldest.txt
    python tests/versions/environments.py newest     # `make test-newest`: the newest that pip finds, now
    python tests/versions/environments.py oldest tests/training/test_callback.py     # these tests alone

They lie in $QKGUARD_ENVIRONMENTS (~/.cache/qkguard/environments). torch for Linux comes from PyPI with CUDA, several
gigabytes; a pip that is told of another index (PIP_EXTRA_INDEX_URL) takes a smaller build where that has one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
PLACE = Path(os.environ.get("QKGUARD_ENVIRONMENTS", "~/.cache/qkguard/environments")).expanduser()
OLDEST = ROOT / "constraints-oldest.txt"
CORE = [
    "adapters",
    "restore",
    "training/test_callback.py",
    "training/test_adapters.py",
    "distributed/test_sharding.py",
]
"""What is run of tests/ where no tests are named: trainings, saves and adapters in one process, sharded tensors."""
RANKS = [
    "ranks_agree",
    "guarded@ddp,fp32,minimax",
    "guarded@zero1,fp32,minimax",
    "guarded@zero2,bf16,qwen3_next,default",
    "guarded@zero3,bf16,qwen3_next,default",
    "neutral@ddp,checkpointing",
    "lora@ddp,phi3",
    "lora@zero2,phi3,dora",
    "lora@zero3,qwen3_next,dora,default",
    "verdict@ddp",
    "failing_write",
]
"""What is run on two ranks then, in one launch: cases of tests/distributed/worker.py."""
SETUPTOOLS = "setuptools>=70.1,<81"  # 70.1 builds wheels by itself; what comes with Python 3.11 is older
TOOLS = ["pytest", "pytest-timeout", "pytest-xdist", "jsonschema", "psutil", "scipy", SETUPTOOLS, "tensorboard"]
SHOWN = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed")


def floors() -> dict[str, str]:
    """Package -> its lower bound in pyproject.toml, those of the extras deepspeed and wandb too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["deepspeed"], *extras["wandb"]]
    return dict(line.split(">=") for line in named if ">=" in line)


def pins() -> dict[str, str]:
    """Package -> version, of constraints-oldest.txt."""
    lines = OLDEST.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def install(name: str) -> Path:
    """Make or renew an environment with what qkguard needs, not qkguard itself; returns its interpreter."""
    folder = PLACE / name
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    chosen = ["-c", str(OLDEST)] if name == "oldest" else ["--upgrade", "--upgrade-strategy", "eager"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    deepspeed = [line for line in extras["deepspeed"] if line.startswith("deepspeed")]
    others = [line for line in extras["deepspeed"] if line not in deepspeed]
    subprocess.run([*pip, *chosen, *project["dependencies"], *extras["wandb"], *others, *TOOLS], check=True)
    # DeepSpeed is built from source, which imports the torch that is there
    subprocess.run([*pip, *chosen, "--no-build-isolation", *deepspeed], check=True)
    return python


def installed() -> str:
    """The versions in this environment, in one line."""
    found = []
    for package in SHOWN:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in ("oldest", "newest"):
        print(f"Found {' '.join(arguments) or 'nothing'}, expected: oldest or newest, then tests.", file=sys.stderr)
        return 2
    python = install(arguments[0])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # see the Makefile
    show = "from tests.versions.environments import installed; print(installed())"
    subprocess.run([python, "-c", show], cwd=ROOT, env=environment, check=True)
    chosen = arguments[1:] or [f"tests/{place}" for place in CORE]
    command = [str(python), "-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", *chosen]
    failed = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if failed or arguments[1:]:
        return failed
    with TemporaryDirectory() as out:
        launch = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        launch += ["-m", "tests.distributed.worker", out, *RANKS]
        failed = subprocess.run(launch, cwd=ROOT, env=environment, check=False).returncode
        print(f"{len(list(Path(out).glob('*.1.json')))} of {len(RANKS)} cases ran on two ranks", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
