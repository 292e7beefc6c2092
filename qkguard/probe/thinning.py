"""Fewer samples of a probe, spread as evenly over its tasks, lengths and depths as all of them are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from qkguard.probe.samples import SampleKey


@dataclass(frozen=True)
class Size:
    """How much of a probe is asked: its `lengths` shortest lengths, and of every task `rounds` samples at each."""

    lengths: int
    rounds: int


def size_of(keys: Sequence[SampleKey]) -> Size:
    """The size that keeps all of the samples."""
    counts: dict[tuple[int, str], int] = {}
    for key in keys:
        counts[key.length, key.task] = counts.get((key.length, key.task), 0) + 1
    return Size(len({key.length for key in keys}), max(counts.values(), default=0))


def thin(keys: Sequence[SampleKey], size: Size) -> tuple[SampleKey, ...]:
    """The samples of a size, in their order. Smaller sizes are subsets of larger ones."""
    tasks = sorted({key.task for key in keys})
    lengths = sorted({key.length for key in keys})[: size.lengths]
    kept: set[SampleKey] = set()
    for i, length in enumerate(lengths):
        for j, task in enumerate(tasks):
            same = [key for key in keys if key.length == length and key.task == task]
            kept.update(_spread(same, i + j)[: size.rounds])
    return tuple(key for key in keys if key in kept)


def _spread(keys: Sequence[SampleKey], shift: int) -> list[SampleKey]:
    """Samples of one task and length in an order whose every beginning covers the depths as evenly as it can.

    `shift` lets tasks and lengths begin at different depths, so that together even one round covers them.
    """
    depths = sorted({key.depth for key in keys})
    stride = _stride(len(depths))
    turn = {depths[(shift + i * stride) % len(depths)]: i for i in range(len(depths))}
    return [key for _, _, key in sorted((key.index, turn[key.depth], key) for key in keys)]


def _stride(count: int) -> int:
    """A step around `count` places that comes to all of them and leaves even gaps: near the golden section."""
    golden = 0.618 * count
    return min((abs(step - golden), step) for step in range(1, count + 1) if gcd(step, count) == 1)[1]
