"""Command lines run in this process, and caches that live as long as the test run."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="qkguard-cache-")
os.environ["QKGUARD_CACHE"] = _CACHE.name  # for subprocesses too
# DeepSpeed's CPU communication is compiled at its first use, a minute's work. In torch's own folder a build that was
# once killed leaves a lock behind, on which everyone after it waits without end.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(_CACHE.name, "torch_extensions"))

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `qkguard` with these arguments: (exit code, stdout, stderr)."""
    from qkguard import cli

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qkguard", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call
