"""`qkguard --install-completion`, and what the shell then gets."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = [sys.executable, "-c", "import sys; sys.argv[0] = 'qkguard'; from qkguard.cli import main; main()"]


def complete(words: str) -> list[str]:
    """What bash is offered for the last of these words."""
    asked = {"_QKGUARD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    return subprocess.run(RUN, capture_output=True, text=True, check=True, env=os.environ | asked).stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_it_installs(shell: str, tmp_path: Path) -> None:
    """Into the shell that it is typed in, which typer finds among the process's parents."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = [shell, "-c", f"{shlex.join([*RUN, '--install-completion'])}; exit $?"]  # a shell that stays a parent
    # a user's shell, not what other tests have left in the environment
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=kept | {"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    written = [file for file in tmp_path.rglob("*") if file.is_file() and "_QKGUARD_COMPLETE" in file.read_text()]
    assert len(written) == 1 and str(written[0]) in done.stdout and done.stderr == ""
    assert shell in done.stdout


def test_commands_and_options_are_completed() -> None:
    assert complete("qkguard re") == ["report", "restore", "recipes"]
    assert complete("qkguard restore --over") == ["--overwrite"]
    assert complete("qkguard restore --nothing") == []
