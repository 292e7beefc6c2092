"""`qkguard demo` with a handful of samples."""

from __future__ import annotations

from functools import partial

import pytest

import qkguard.cli.demo
from qkguard.demo import DemoSettings

SMALL = {"lengths": (256,), "depths": 2, "samples": 1, "problems": 2, "batch": 2, "tasks": ("s2",)}


def make_small(patch: pytest.MonkeyPatch) -> None:
    """The command's own path, with settings that take seconds; where the command itself looks them up."""
    patch.setattr(qkguard.cli.demo, "DemoSettings", partial(DemoSettings, **SMALL))
