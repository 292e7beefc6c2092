"""Which weights lost the recall: groups taken back alone, and left alone from SFT; pure functions on measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qkguard.choice.candidates import Candidate
from qkguard.choice.groups import WeightGroup
from qkguard.choice.verdict import Interval, Measurement, compare
from qkguard.probe.results import ProbeResult
from qkguard.probe.statistics import at_floor
from qkguard.probe.words import floor_clause

QK = "qk"
NOTHING = Interval(0, 0, 0)


@dataclass(frozen=True)
class GroupEffect:
    """What one group of weights does to recall.

    `back` is the tuned model with this group from the base (leave-one-in), `alone` the base with this group from SFT,
    that is, everything but it taken back (leave-one-out); both None where SFT did not change the group. `brings` is
    the recall that the first has above the tuned model, `costs` what the second has below the base, paired on the same
    samples.
    """

    group: WeightGroup
    back: Measurement | None = None
    alone: Measurement | None = None
    brings: Interval = NOTHING
    costs: Interval = NOTHING

    @property
    def explains(self) -> bool:
        """Whether it brings recall back alone, and loses it alone, each beyond noise."""
        return self.brings.low > 0 and self.costs.low > 0

    @property
    def explained(self) -> float:
        """How much of the loss it explains, for ranking."""
        return self.brings.value + self.costs.value


@dataclass(frozen=True)
class Attribution:
    """Every group's effect, in the groups' order; `base` and `raw` are the whole checkpoints on the same samples."""

    effects: list[GroupEffect]
    base: Measurement
    raw: Measurement

    @property
    def cause(self) -> list[str]:
        """Short names of the groups that explain the loss, the largest share first; empty where none does alone."""
        if not self.lost:
            return []
        found = sorted((e for e in self.effects if e.explains), key=_explained, reverse=True)
        return [effect.group.key for effect in found]

    @property
    def lost(self) -> bool:
        """Whether SFT cost recall beyond noise."""
        return self.base.gain.low > 0

    @property
    def words(self) -> list[str]:
        return explain_attribution(self)

    def of(self, key: str) -> GroupEffect | None:
        """The effect of a group; None where the model has no such weights."""
        return next((effect for effect in self.effects if effect.group.key == key), None)

    def to_json(self, tolerance: float) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {
            "words": self.words,
            "cause": self.cause,
            "groups": [_effect_json(effect, tolerance) for effect in self.effects],
        }


def attribute(
    groups: Sequence[WeightGroup],
    changed: Iterable[str],
    measured: Mapping[frozenset[str], tuple[ProbeResult, Any]],
    base: Measurement,
    raw: Measurement,
    seed: int,
) -> Attribution:
    """Compare what was measured for every set of groups that came from the base.

    Args:
        groups: all of them.
        changed: short names of those that SFT changed.
        measured: set of changed groups that came from the base -> recall and task quality, for `states_to_measure`.
        base, raw: the whole checkpoints, on the same samples and rows.
        seed: of the bootstrap.
    """
    every = frozenset(changed)
    raw, base = replace(raw), replace(base)  # `compare` fills them in anew
    measured = {frozenset[str](): (raw.probe, raw.task), **measured}
    points, effects = [raw, base], []
    for group in groups:
        if group.key not in every:
            effects.append(GroupEffect(group))
            continue
        back = Measurement(Candidate(f"{group.title} taken back", "group"), *measured[frozenset({group.key})])
        alone = Measurement(Candidate(f"all but {group.title} taken back", "group"), *measured[every - {group.key}])
        points += [back, alone]
        fall = alone.probe.drop_since(base.probe)
        effects.append(GroupEffect(group, back, alone, costs=Interval(fall.drop, fall.low, fall.high)))
    compare(points, seed)
    effects = [_with_gain(effect) for effect in effects]
    return Attribution(effects, base, raw)


def states_to_measure(changed: Iterable[str]) -> list[frozenset[str]]:
    """The sets of groups to take from the base: each alone, then all but each; no set twice, and none is empty."""
    every = frozenset(changed)
    alone = [frozenset({key}) for key in sorted(every)]
    return [state for state in dict.fromkeys([*alone, *(every - one for one in alone)]) if state]


def _with_gain(effect: GroupEffect) -> GroupEffect:
    if effect.back is None:
        return effect
    return replace(effect, brings=effect.back.gain)


def _explained(effect: GroupEffect) -> float:
    return effect.explained


def _effect_json(effect: GroupEffect, tolerance: float) -> dict[str, Any]:
    group = effect.group
    named = group.key in ("other", "shared")
    return {
        "key": group.key,
        "title": group.title,
        "tensors": len(group.parts),
        "elements": group.elements,
        "names": [str(part) for part in group.parts] if named else None,
        "changed": effect.back is not None,
        "brings": effect.brings.to_json(),
        "costs": effect.costs.to_json(),
        "taken_back": None if effect.back is None else _measured_json(effect.back, tolerance),
        "all_others_taken_back": None if effect.alone is None else _measured_json(effect.alone, tolerance),
    }


def _measured_json(point: Measurement, tolerance: float) -> dict[str, Any]:
    kept = ("recall", "recall_by_length", "answer_logprob", "task")
    return {key: value for key, value in point.to_json(tolerance).items() if key in kept}


def explain_attribution(found: Attribution) -> list[str]:
    """What the numbers say, in sentences: first whether it is queries and keys."""
    total = found.base.probe.total
    if at_floor(total.hits, total.count):
        return [f"{floor_clause(total.hits, total.count, 'The base')}, and no loss can be attributed."]
    if not found.lost:
        return [
            f"SFT cost no recall beyond noise ({found.base.recall.value:.3f} before, {found.raw.recall.value:.3f} "
            "after), so there is no loss to attribute."
        ]
    return [*_queries_and_keys(found), *_cause(found), *_skill(found)]


def _queries_and_keys(found: Attribution) -> list[str]:
    effect = found.of(QK)
    if effect is None or effect.back is None or effect.alone is None:
        return ["Is it queries and keys? No: SFT did not change them."]
    if effect.explains:
        answer = "Yes" if found.cause[0] == QK else "In part"
        return [f"Is it queries and keys? {answer}: {_taken_back(effect, found)}, and {_left_alone(effect, found)}."]
    if effect.brings.low > 0:
        return [
            f"Is it queries and keys? In part: {_taken_back(effect, found)}, but {_left_alone(effect, found)}: it "
            "takes other changes too."
        ]
    if effect.costs.low > 0:
        return [
            f"Is it queries and keys? In part: {_left_alone(effect, found)}, but {_taken_back(effect, found)}: other "
            "weights lose it as well."
        ]
    return [f"Is it queries and keys? No: {_taken_back(effect, found)}, and {_left_alone(effect, found)}."]


def _cause(found: Attribution) -> list[str]:
    """What else explains the loss."""
    sentences = []
    for key in found.cause:
        effect = found.of(key)
        if key != QK and effect is not None:
            also = "also " if found.cause[0] == QK else ""
            halves = f"{_taken_back(effect, found)}, and {_left_alone(effect, found)}"
            sentences.append(f"It is {also}{effect.group.title}: {halves}.")
    if not found.cause:
        largest = max(found.effects, key=_explained)
        sentences.append(
            "No group alone both brings recall back and loses it beyond noise: the loss comes from several together"
            + (f", most of it with {largest.group.title}." if largest.explained > 0 else ".")
        )
    return sentences


def _taken_back(effect: GroupEffect, found: Attribution) -> str:
    """The half of a sentence on the tuned model with the group from the base."""
    assert effect.back is not None
    numbers = f"{found.raw.recall.value:.3f} to {effect.back.recall.value:.3f}"
    if effect.brings.low > 0:
        return f"taken back alone they bring back {_share(effect.brings, found)} of the lost recall ({numbers})"
    return f"taken back alone they bring back none beyond noise ({numbers})"


def _left_alone(effect: GroupEffect, found: Attribution) -> str:
    """The half of a sentence on the base with the group from SFT."""
    assert effect.alone is not None
    numbers = f"{found.base.recall.value:.3f} to {effect.alone.recall.value:.3f}"
    if effect.costs.low > 0:
        return f"SFT's, put into the base alone, lose {_share(effect.costs, found)} of it ({numbers})"
    return f"SFT's, put into the base alone, lose none beyond noise ({numbers})"


def _share(effect: Interval, found: Attribution) -> str:
    return f"{min(1.0, effect.value / found.base.gain.value):.0%}"


def _skill(found: Attribution) -> list[str]:
    """Where the task sits: whose return to the base costs most of it."""
    priced = [(effect, effect.back) for effect in found.effects if effect.back is not None and effect.back.change]
    if not priced:
        return []
    dearest = min(priced, key=_change)
    said = [f"taking back {dearest[0].group.title} costs most, {_price(dearest[1])}"]
    mine = next((point for effect, point in priced if effect.group.key == QK), None)
    if mine is not None and dearest[0].group.key != QK:
        said.append(f"queries and keys {_price(mine)}")
    return [f"Of what SFT taught, {'; '.join(said)}."]


def _change(priced: tuple[GroupEffect, Measurement]) -> float:
    change = priced[1].change
    return 0.0 if change is None else change.value


def _price(point: Measurement) -> str:
    """A change of task quality with its interval, in the direction of its metric."""
    assert point.task is not None and point.change is not None
    accuracy = point.task.accuracy is not None
    sign = 1 if accuracy else -1
    value, low, high = (sign * v + 0.0 for v in (point.change.value, point.change.low, point.change.high))
    low, high = sorted((low, high))
    return f"task {'accuracy' if accuracy else 'loss'} {value:+.3f} (95% {low:+.3f} to {high:+.3f})"
