"""Printing: tables and sentences on stdout, JSON instead where asked for, progress bars on a terminal only."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qkguard.report.numbers import human_bytes, number

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def quiet_transformers() -> None:
    """Keep the library's remarks about configs out of a command's output; the user's own setting wins."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def leave_without_collecting() -> None:
    """Let this process end without a last look through all objects for what could be freed: most of a second, where
    the model code of transformers was imported.

    For commands whose files are closed by then: what only the collector would close at the end stays open.
    """
    atexit.register(gc.freeze)


def keep_freed_memory() -> None:
    """Let this process use the memory that a large tensor leaves for the next one, where the C library is glibc.

    By default every tensor of 32 MB and more goes back to the kernel, which zeroes its pages before it hands them out
    again: where tensors live for milliseconds, that takes longer than what is done with them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
        mallopt(parameter, value)


def threads_sleep() -> None:
    """Let torch's threads sleep while they wait for each other, unless the user's setting says otherwise; before torch
    is imported.

    GNU's OpenMP lets them spin. Where others use the processors too, the one that is waited for then gets no turn, and
    small operations take ten times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def no_loading_bars() -> None:
    """transformers draws a bar while it loads weights, even where stderr is no terminal. Imports transformers."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def print_json(data: Any) -> None:
    """JSON on stdout, nothing else; NaN and Inf become null."""
    from qkguard.checkpoint.manifest import dump

    sys.stdout.write(dump(data))


def say(text: str) -> None:
    """One sentence or more on stdout, never wrapped inside a path when piped."""
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def warn(warnings: Iterable[str]) -> None:
    """Each warning as one line on stderr."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """A table on stdout; the first column is text, a leading "<" makes another one text, the others are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        left = i == 0 or name.startswith("<")
        table.add_column(escape(name.removeprefix("<")), justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))  # "[...]" is text, and no markup of rich's
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)


@contextmanager
def progress_bar(label: str, *, in_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that draws a bar on stderr after a second; silent where that is not a terminal."""
    if not sys.stderr.isatty():
        yield _no_bar
        return
    import time

    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn(), console=Console(stderr=True)
    )
    began, task = time.monotonic(), bar.add_task(label, total=None)

    def update(done: int, total: int) -> None:
        if not bar.live.is_started and time.monotonic() - began > 1:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        bar.stop()


def _no_bar(done: int, total: int) -> None:
    pass


def drifts(layers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """("queries", "mean 0.12, largest 0.3") and the same of the keys, from the layers of a manifest."""
    for role, name in (("q_rel", "queries"), ("k_rel", "keys")):
        values = [layer["drift"][role] for layer in layers if layer["drift"].get(role) is not None]
        if values:
            yield name, f"mean {number(sum(values) / len(values))}, largest {number(max(values))}"


def show_written(out: Path, manifest: Mapping[str, Any], sentences: Iterable[str], *, as_json: bool) -> None:
    """What a command that wrote a checkpoint prints: the manifest as JSON, or sentences and the next command."""
    warn(manifest["warnings"])
    if as_json:
        print_json({"out": str(out), **manifest})
        return
    for sentence in sentences:
        say(sentence)
    say(f"next: qkguard verify {out}")


def weight_size(manifest: Mapping[str, Any]) -> str:
    """Size of the weight files of a manifest, "1.2 MB"."""
    return human_bytes(sum(file["size"] for file in manifest["files"].values()))
