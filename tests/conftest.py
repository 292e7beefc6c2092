"""Command lines run in this process, and caches that live as long as the test run."""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="qkguard-cache-")
os.environ["QKGUARD_CACHE"] = _CACHE.name  # for subprocesses too
# for subprocesses alone; Python imports sitecustomize at its start
_STARTING = str(Path(__file__).parent / "support" / "starting")
os.environ["PYTHONPATH"] = os.pathsep.join([_STARTING, *filter(None, [os.environ.get("PYTHONPATH")])])

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # without bytecode a process that imports TRL starts 6 s later
sys.dont_write_bytecode = False

LONGEST = ("distributed/test_ranks.py", "examples/test_examples.py", "docs/test_blocks.py", "offline/test_zoo.py")
"""Files that take minutes. A file runs on one worker: one that began last would run on when all others are done."""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def the_package_s_logger() -> Iterator[None]:
    """Commands run in this process set up the package's logger; the next test finds it as it was."""
    logger = logging.getLogger("qkguard")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all others in their order."""
    places = {str(Path(__file__).parent / name): number for number, name in enumerate(LONGEST)}
    items.sort(key=partial(_place, places))


@pytest.fixture(scope="module", autouse=True)
def nothing_old_in_the_garbage() -> None:
    """Trainers collect garbage often; what earlier modules have imported need not be gone through each time."""
    gc.collect()
    gc.freeze()


def _place(places: dict[str, int], item: pytest.Item) -> int:
    return places.get(str(item.path), len(places))


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
