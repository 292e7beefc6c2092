"""What a command takes: time, processor time and memory, as `/usr/bin/time` has them."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple


class Took(NamedTuple):
    """Wall seconds, seconds of processor time, peak resident memory in MB."""

    seconds: float
    cpu: float
    megabytes: float


def timed(command: Sequence[str]) -> Took:
    """Run a command with nothing on stdout.

    Through `/usr/bin/time`: what a child is said to have needed at most includes what its parent held when it forked.
    Python may keep its bytecode, as it does unless told otherwise: without it, imports take twice as long.
    """
    with tempfile.NamedTemporaryFile("r") as report:
        os.sync()
        asked = ["/usr/bin/time", "-f", "%e %U %S %M", "-o", report.name, *command]
        with_bytecode = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
        subprocess.run(asked, check=True, stdout=subprocess.DEVNULL, env=with_bytecode)
        seconds, user, system, kilobytes = map(float, report.read().split())
    return Took(seconds, user + system, kilobytes / 1000)
