"""Alerts where the loss is: at one length, in one task, over all; and none without a change."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from qkguard.probe.alerts import EVERYWHERE, LEAST, Spending, find_falls, places, untested
from qkguard.probe.results import ProbeResult
from qkguard.probe.samples import SampleKey, plan
from qkguard.probe.statistics import LEVEL

KEYS = plan(["single_2", "multikey_1", "multikey_2"], [512, 1024, 2048, 8192], 5, 2)
LOOKS = 10  # along a training, the last of them at its end

Found = Callable[[SampleKey], bool]


def result(found: Found, keys: tuple[SampleKey, ...] = KEYS) -> ProbeResult:
    return ProbeResult(keys, tuple(found(key) for key in keys), (-1.0,) * len(keys), {"digest": "same"})


def where(now: ProbeResult, before: ProbeResult, threshold: float = 0.1, level: float = LEVEL) -> list[str]:
    return [fall.where for fall in find_falls(now, before, threshold, level)]


def mostly(key: SampleKey) -> bool:
    """Before: 60% found, at every length and in every task."""
    return key.index == 0 or key.depth == 0.5


def test_a_collapse_at_one_length_is_seen_where_the_mean_rises() -> None:
    now = result(lambda key: key.length < 8192)
    before = result(mostly)
    assert now.recall > before.recall
    (fall,) = find_falls(now, before, 0.1, LEVEL / LOOKS)
    assert fall.where == " at 8,192 tokens" and (fall.drop.before, fall.drop.now) == (0.6, 0)
    assert fall.to_json()["value"] == 8192
    assert where(result(lambda key: True), before) == [], "a rise everywhere"


def test_a_collapse_in_one_task_is_seen_where_the_mean_rises() -> None:
    now = result(lambda key: key.task != "multikey_2")
    assert now.recall > result(mostly).recall
    assert where(now, result(mostly), level=LEVEL / LOOKS) == [" in multikey_2"]


def test_a_fall_everywhere_is_named_where_it_is_largest_first() -> None:
    now = result(lambda key: key.length == 512)
    found = find_falls(now, result(lambda key: True), 0.1, LEVEL)
    assert {fall.where for fall in found[:3]} == {" at 1,024 tokens", " at 2,048 tokens", " at 8,192 tokens"}
    assert any(fall.place == EVERYWHERE for fall in found)
    assert where(now, result(lambda key: True), threshold=0.9) == [fall.where for fall in found[:3]]


def test_what_noise_explains_is_no_fall() -> None:
    before = result(lambda key: True)
    few = KEYS[:4]
    assert where(result(lambda key: key not in few), before) == [], "4 of 120 may be noise: 1 in 16"
    some = {key for key in KEYS if key.length == 8192 and key.depth < 0.4}  # 12 of 30
    assert where(result(lambda key: key not in some), before, threshold=0.05) == [" at 8,192 tokens", ""]
    assert where(result(lambda key: key not in some), before, threshold=0.2) == [" at 8,192 tokens"]
    swapped = result(lambda key: key.depth in (0.0, 0.25))
    assert where(result(lambda key: key.depth in (0.5, 0.75)), swapped) == [], "as many gained as lost"


def test_groups_with_too_few_samples_are_not_tested_and_are_named() -> None:
    keys = plan(["s1", "mk1"], [512, 1024], 3, 1)
    assert places(keys) == {EVERYWHERE: 12} | {("length", n): 6 for n in (512, 1024)} | {
        ("task", task): 6 for task in ("multikey_1", "single_1")
    }
    assert untested(keys) == [place for place in places(keys) if place != EVERYWHERE]
    assert untested(KEYS) == [] and untested(plan(["s1"], [512], 7, 1)) == [EVERYWHERE] and LEAST == 8
    lost = result(lambda key: key.length == 512, keys)
    assert where(lost, result(lambda key: True, keys)) == [""], "6 of 6 at one length, 6 of 12 in all"
    eight = plan(["s1"], [512], 4, 2)
    level = Spending(0.5).look(1.0, last=True)
    assert where(result(lambda key: False, eight), result(lambda key: True, eight), level=level) == [""]


def alarms(seed: int, level_of: Callable[[Spending, int], float]) -> bool:
    """Whether a training without a change alerts: at every look each sample is found by its own chance."""
    rng = Random(seed)
    chances = {key: rng.choice((0.1, 0.5, 0.9)) for key in KEYS}
    before, spending = result(lambda key: rng.random() < chances[key]), Spending()
    for look in range(1, LOOKS + 1):
        now = result(lambda key: rng.random() < chances[key])
        if find_falls(now, before, 0.01, level_of(spending, look)):
            return True
    return False


def shared(spending: Spending, look: int) -> float:
    return spending.look(look / LOOKS, last=look == LOOKS)


def whole(spending: Spending, look: int) -> float:
    return LEVEL


def test_a_thousand_trainings_without_a_change_alert_in_at_most_five_percent() -> None:
    assert sum(alarms(seed, shared) for seed in range(1000)) <= 50
    assert sum(alarms(seed, whole) for seed in range(200)) > 10, "without a correction for the looks it is more"


@pytest.mark.parametrize("steps", [[0.1, 0.2, 0.3, 1.0], [0.5, 0.4, 0.9, 0.95, 1.0], [1.0]])
def test_all_looks_together_spend_the_level_whatever_their_number(steps: list[float]) -> None:
    spending = Spending()
    levels = [spending.look(progress, last=progress == 1.0) for progress in steps]
    assert sum(levels) == pytest.approx(LEVEL) and min(levels) >= 0 and levels[-1] >= LEVEL / 2
    resumed = Spending(0.3)
    assert resumed.look(0.6, last=False) == 0 and resumed.look(0.8, last=False) == pytest.approx(0.1 * LEVEL)
