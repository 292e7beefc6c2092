"""Where recall has fallen beyond noise: over all samples, at one length or in one task. Pure functions.

A mean hides a collapse beyond the training window, or in one task, where the rest gains. So each of these is tested,
by the exact sign test on the samples whose verdict changed, and all of them share one error: an alert without a change
comes in at most 5% of trainings, however many groups and points in time are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qkguard.probe.results import Drop, ProbeResult
from qkguard.probe.samples import SampleKey
from qkguard.probe.statistics import LEAST, LEVEL, paired_interval, sign_test

EVERYWHERE = ("", None)
Place = tuple[str, Any]
"""("length", 4096), ("task", "multikey_1"), or `EVERYWHERE`."""


@dataclass(frozen=True)
class Fall:
    """A fall of recall that noise does not explain."""

    place: Place
    drop: Drop

    @property
    def where(self) -> str:
        """With the blank before it: " at 4,096 tokens", " in multikey_1", or nothing."""
        return name_of(self.place)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings, for `metrics.jsonl`."""
        kind, value = self.place
        numbers = {name: getattr(self.drop, name) for name in ("before", "now", "low", "high", "count")}
        return {"kind": kind, "value": value, "where": self.where.strip(), **numbers}


def name_of(place: Place) -> str:
    """A place in words, with the blank before them."""
    kind, value = place
    if kind == "length":
        return f" at {value:,} tokens"
    return f" in {value}" if kind == "task" else ""


def places(keys: Sequence[SampleKey]) -> dict[Place, int]:
    """All samples, every length and every task, with their numbers of samples; what would be the same is left out."""
    counts: dict[Place, int] = {EVERYWHERE: len(keys)}
    for kind in ("length", "task"):
        values = [getattr(key, kind) for key in keys]
        found = sorted(set(values))
        if len(found) > 1:
            counts |= {(kind, value): values.count(value) for value in found}
    return counts


def untested(keys: Sequence[SampleKey]) -> list[Place]:
    """Where there are too few samples for an alert."""
    return [place for place, count in places(keys).items() if count < LEAST]


def find_falls(now: ProbeResult, before: ProbeResult, threshold: float, level: float) -> list[Fall]:
    """Falls of at least `threshold` since an earlier probe, at a family-wise error of `level`; the largest first.

    Holm's method over the groups that can be significant at all. A group with m changed samples has no p-value below
    2^-m, and which samples changed says nothing of the direction; so groups without a chance need not be paid for.

    Sources: Holm 1979, "A simple sequentially rejective multiple test procedure"; Tarone 1990, "A modified Bonferroni
    method for discrete data".

    Raises:
        QKGuardError: the two probed different samples.
    """
    pairs = now.pairs_with(before)
    counted = places([key for key, _, _ in pairs])
    tested = {place: _Count() for place, count in counted.items() if count >= LEAST}
    for key, was, is_now in pairs:
        for place in (EVERYWHERE, ("length", key.length), ("task", key.task)):
            if place in tested:
                tested[place].add(was, is_now)
    able = _able(tested, level)
    found = []
    p_values = {place: tested[place].p_value for place in able}
    for rank, place in enumerate(sorted(able, key=p_values.__getitem__)):
        if p_values[place] > level / (len(able) - rank):
            break
        drop = tested[place].drop()
        if drop.drop >= threshold:
            found.append(Fall(place, drop))
    return sorted(found, key=_size, reverse=True)


def _size(fall: Fall) -> float:
    return fall.drop.drop


@dataclass
class _Count:
    """Samples of one group."""

    count: int = 0
    hits: int = 0
    lost: int = 0
    gained: int = 0

    def add(self, before: bool, now: bool) -> None:
        self.count += 1
        self.hits += before
        self.lost += before and not now
        self.gained += now and not before

    @property
    def p_value(self) -> float:
        return sign_test(self.lost, self.gained)

    @property
    def least_p_value(self) -> float:
        return sign_test(self.lost + self.gained, 0)

    def drop(self) -> Drop:
        before, now = self.hits / self.count, (self.hits - self.lost + self.gained) / self.count
        low, high = paired_interval(self.lost, self.gained, self.count)
        return Drop(before, now, low, high, self.p_value, self.count, self.lost, self.gained)


def _able(counts: dict[Place, _Count], level: float) -> list[Place]:
    """Tarone's set: the groups that can reach `level` / k, for the smallest k that is no less than their number."""
    for k in range(1, len(counts) + 1):
        able = [place for place, count in counts.items() if count.least_p_value <= level / k]
        if len(able) <= k:
            return able
    return []


@dataclass
class Spending:
    """The level of significance, dealt out over the looks of one training.

    Half of it becomes free evenly along the run, and each look takes what has become free since the one before; half
    is kept for the end, where a loss is largest and the model is taken. The levels of all looks together are `LEVEL`,
    so the chance that any of them alerts without a change is at most that (Bonferroni over time).

    Attributes:
        spent: as a share of `LEVEL`.
    """

    spent: float = 0.0

    def look(self, progress: float, *, last: bool) -> float:
        """The level of a look at `progress` (0 to 1) of the training; 0 where none is left."""
        free = 1.0 if last else progress / 2
        level = LEVEL * max(0.0, free - self.spent)
        self.spent = max(self.spent, free)
        return level
