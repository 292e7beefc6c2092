"""An environment for each framework that the guard is tested in, without what needs a GPU.

    python tests/integrations/environments.py            # `make test-integrations` makes them and runs the tests
    python tests/integrations/environments.py axolotl

They lie in $QKGUARD_ENVIRONMENTS (~/.cache/qkguard/environments), a gigabyte each. A framework is installed without
its own dependencies; beside it stand the versions that it pins of what it trains with, and what its code imports on
the way to a training. qkguard itself is not installed: the tests put this repository on the path.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACE = Path(os.environ.get("QKGUARD_ENVIRONMENTS", "~/.cache/qkguard/environments")).expanduser()
TORCH = "torch==2.13.0"
OURS = ["filelock", "jinja2", "matplotlib", "ml_dtypes", "packaging", "pyyaml", "rich", "safetensors", "tqdm", "typer"]


@dataclass(frozen=True)
class Environment:
    """What is installed.

    Attributes:
        framework: the framework as pip names it, with the version that is tested.
        pinned: what it trains with, in versions that it allows.
        imported: what its code imports besides; installed without dependencies.
        stubs: modules that exist as GPU builds alone and are imported, but not used: empty files in their place.
    """

    framework: str
    pinned: list[str]
    imported: list[str] = field(default_factory=list)
    stubs: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.framework.partition("=")[0]

    @property
    def python(self) -> Path:
        return PLACE / self.name / "bin" / "python"


ENVIRONMENTS = {
    "axolotl": Environment(
        "axolotl==0.21.0",
        [
            "transformers==5.20.1",
            "trl==1.14.1",
            "peft==0.21.2",
            "accelerate==1.15.0",
            "datasets==5.0.1",
            "huggingface_hub>=1.31,<2",
            "tokenizers==0.23.3",
            "pydantic==2.13.5",
            "axolotl-contribs-lgpl==0.0.7",
            "axolotl-contribs-mit==0.0.6",
            "requests",
            "wandb",
        ],
        [
            "addict",
            "fire",
            "termcolor",
            "einops",
            "colorama",
            "python-dotenv",
            "distro",
            "posthog",
            "backoff",
            "numba",
            "llvmlite",
            "fastcore",
            "kernels",
            "bitsandbytes==0.50.2",
            "evaluate",
        ],
    ),
    "ms-swift": Environment(
        "ms-swift==4.6.0",
        [
            "transformers==5.19.0",
            "trl==0.29.1",
            "peft==0.20.0",
            "datasets==4.8.4",
            "accelerate",
            "pydantic",
            "modelscope==1.40.2",
        ],
        ["json_repair==0.64.6", "einops"],
    ),
    "llamafactory": Environment(
        "llamafactory==0.9.5",
        ["transformers==5.6.0", "trl==0.24.0", "peft==0.18.1", "accelerate==1.11.0", "datasets==4.0.0", "pydantic"],
        ["omegaconf==2.4.0"],
        ["torchaudio"],
    ),
    "unsloth": Environment(  # trains on a CPU with stock transformers: the patches of its GPU kernels are not loaded
        "unsloth==2026.10.9",
        ["transformers==5.17.0", "trl==1.15.0", "peft==0.21.2", "accelerate", "datasets==4.8.4", "pydantic"],
        [
            "unsloth_zoo==2026.10.9",
            "bitsandbytes==0.50.2",  # this and what follows: for its GPU patches, which are looked at, not run
            "cut_cross_entropy",
            "diffusers",
            "docstring-parser",
            "einops",
            "hf_transfer",
            "kernels",
            "msgspec",
            "nest-asyncio",
            "pillow",
            "protobuf",
            "sentencepiece",
            "torchao==0.18.0",
            "triton==3.7.0",
            "typeguard",
            "tyro",
        ],
    ),
}


def install(environment: Environment) -> None:
    """Make an environment; one that is complete is left as it is."""
    folder = environment.python.parents[1]
    done, wanted = folder / "installed.txt", repr(environment)
    if done.is_file() and done.read_text() == wanted:
        return
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(environment.python), "-m", "pip", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, TORCH, "numpy<2.5", *environment.pinned, *OURS, "pytest"], check=True)
    # the wheel's own bounds of Python may be newer than this one: its code runs all the same
    bare = [*pip, "--no-deps", "--ignore-requires-python"]
    subprocess.run([*bare, environment.framework, *environment.imported], check=True)
    for name in environment.stubs:
        (next(folder.glob("lib/python*/site-packages")) / f"{name}.py").write_text(
            '"""A stand-in: see environments.py."""\n'
        )
    done.write_text(wanted)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ENVIRONMENTS:
        print(f"{chosen}: {ENVIRONMENTS[chosen].python.parents[1]}", flush=True)
        install(ENVIRONMENTS[chosen])
