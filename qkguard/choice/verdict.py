"""Which candidate to take, and what the numbers say about the run: pure functions on measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qkguard.choice.candidates import Candidate
from qkguard.choice.task import TaskResult
from qkguard.probe.results import ProbeResult
from qkguard.probe.statistics import at_floor, paired_interval, wilson
from qkguard.probe.words import floor_clause

RESAMPLES = 2000  # bootstrap draws of losses: the ends of a 95% interval have 50 of them beyond
FREE = 1e-3  # of task quality: a smaller loss, less than one row in a thousand, counts as none when layers are ranked


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass
class Measurement:
    """What came of one candidate.

    `recall` and `quality` (accuracy, or minus the loss in nats per token) with intervals; `gain` and `change` are
    their paired differences from raw. `layers` is what the method did, `same_as` an earlier candidate with the same
    weights, whose numbers these are. `pareto`: no other one beats it.
    """

    candidate: Candidate
    probe: ProbeResult
    task: TaskResult | None
    layers: list[dict[str, Any]] = field(default_factory=list)
    same_as: str | None = None
    recall: Interval = Interval(0, 0, 0)
    gain: Interval = Interval(0, 0, 0)
    quality: Interval | None = None
    change: Interval | None = None
    pareto: bool = False

    @property
    def name(self) -> str:
        return self.candidate.name

    def to_json(self, tolerance: float) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        task = None
        if self.task is not None and self.quality is not None and self.change is not None:
            task = {"loss": self.task.loss, "accuracy": self.task.accuracy, "quality": self.quality.to_json()}
            task |= {"change": self.change.to_json(), "within_tolerance": within(self, tolerance)}
        return {
            "name": self.name,
            "kind": self.candidate.kind,
            "method": self.candidate.method if self.candidate.tensors else None,
            "options": dict(self.candidate.options),
            "tensors": list(self.candidate.tensors),
            "layers": None if self.candidate.layers is None else list(self.candidate.layers),
            "recall": self.recall.to_json(),
            "gain": self.gain.to_json(),
            "recall_by_length": {str(n): g.recall for (n,), g in self.probe.by("length").items()},
            "answer_logprob": self.probe.answer_logprob,
            "task": task,
            "pareto": self.pareto,
            "same_as": self.same_as,
            "did": self.layers,
        }


@dataclass(kw_only=True)
class Verdict:
    """What was measured, and which candidate is recommended by it.

    `data` says in words what the task quality is of: "128 rows of the evaluation set"; empty where there is none.
    """

    points: list[Measurement]
    recommended: Measurement
    tolerance: float
    data: str = ""

    @classmethod
    def of(cls, points: Sequence[Measurement], tolerance: float, data: str = "", seed: int = 0) -> Verdict:
        """Compare the points with raw, and apply the rule."""
        compare(points, seed)
        return cls(points=list(points), recommended=recommend(points, tolerance), tolerance=tolerance, data=data)

    @property
    def metric(self) -> str | None:
        """What task quality is: "accuracy", "loss" or None."""
        task = _first(self.points, "raw").task
        return None if task is None else "loss" if task.accuracy is None else "accuracy"

    @property
    def rule(self) -> str:
        return describe_rule(self.tolerance, self.metric)

    @property
    def words(self) -> list[str]:
        return explain(self.points, self.recommended, self.tolerance, self.data)

    def summary(self) -> dict[str, Any]:
        """The part that goes into manifests."""
        keys = ("name", "recall", "task", "pareto")
        points = [{k: v for k, v in p.to_json(self.tolerance).items() if k in keys} for p in self.points]
        return {"recommended": self.recommended.name, "rule": self.rule, "words": self.words, "points": points}


def compare(points: Sequence[Measurement], seed: int) -> None:
    """Fill in intervals, differences from raw, and which points no other one beats; the same draws for all."""
    raw = _first(points, "raw")
    random = np.random.default_rng(seed)
    rows = random.integers(len(raw.task.nll), size=(RESAMPLES, len(raw.task.nll))) if raw.task else None
    for point in points:
        found, change = point.probe.total, point.probe.change_since(raw.probe)
        point.recall = Interval(found.recall, *found.interval)
        point.gain = Interval(change["value"], change["low"], change["high"])
        if rows is not None and point.task and raw.task:
            point.quality, point.change = _task_intervals(point.task, raw.task, rows)
    for point in points:
        point.pareto = point.candidate.kind in ("raw", "method") and not any(
            _beats(other, point) for other in points if other.candidate.kind in ("raw", "method")
        )


def quality_of(task: TaskResult) -> float:
    """Accuracy where rows have answers, else minus the loss: larger is better."""
    return -task.loss if task.accuracy is None else task.accuracy


def recommend(points: Sequence[Measurement], tolerance: float) -> Measurement:
    """The candidate that `describe_rule` describes."""
    raw = _first(points, "raw")
    allowed = [p for p in points if p.candidate.recommendable and p.gain.low > 0 and within(p, tolerance)]
    return max(allowed, key=_recall_then_quality, default=raw)


def within(point: Measurement, tolerance: float) -> bool:
    """Whether a point's task quality is at most `tolerance` below raw's; True where no task was measured."""
    return point.change is None or point.change.value >= -tolerance


def describe_rule(tolerance: float, metric: str | None) -> str:
    """How `recommend` chooses, as a sentence."""
    kept = {
        None: "",
        "accuracy": f" and task accuracy is at most {tolerance:g} below raw's",
        "loss": f" and task loss is at most {tolerance:g} nats per token above raw's",
    }[metric]
    return (
        "highest recall among the restored points whose recall is above raw's beyond noise (95% interval of the "
        f"paired difference){kept}; raw where there is none; of equal ones the one with the better task quality"
    )


def explain(points: Sequence[Measurement], chosen: Measurement, tolerance: float, data: str = "") -> list[str]:
    """What the numbers say, in sentences, also where they speak against restoring; the last one recommends."""
    raw = _first(points, "raw")
    base = next((p for p in points if p.candidate.kind == "base"), None)
    methods = [p for p in points if p.candidate.recommendable]
    best = max(methods, key=_recall, default=None)
    whole = next((p for p in methods if p.candidate.method == "restore" and p.candidate.is_whole), None)
    controls = [p for p in points if p.candidate.kind == "control" and set(p.candidate.tensors) & {"v", "o"}]
    sentences = []
    if base is not None:
        sentences.append(_damage(base, raw))
    if whole is not None:
        sentences.append(_whole(whole, base, raw))
    elif best is not None:
        sentences.append(
            f"The highest recall is {best.recall.value:.3f}, with {best.name} ({raw.recall.value:.3f} raw)."
        )
    if controls and best is not None:
        sentences.append(_values_and_outputs(max(controls, key=_recall), best))
    sentences += [_reach(raw), *([_price(chosen, tolerance, data)] if chosen.change and chosen is not raw else [])]
    return [*sentences, _choice(chosen, raw, methods, tolerance)]


def _first(points: Sequence[Measurement], kind: str) -> Measurement:
    return next(p for p in points if p.candidate.kind == kind)


def _recall_then_quality(point: Measurement) -> tuple[float, float]:
    return point.recall.value, point.change.value if point.change else 0.0


def _recall(point: Measurement) -> float:
    return point.recall.value


def _damage(base: Measurement, raw: Measurement) -> str:
    found = base.probe.total
    if at_floor(found.hits, found.count):
        return f"{floor_clause(found.hits, found.count, 'The base')}."
    if base.gain.low > 0:
        return f"SFT took recall from {base.recall.value:.3f} to {raw.recall.value:.3f}."
    return (
        f"SFT cost no recall beyond noise on these samples ({base.recall.value:.3f} before, "
        f"{raw.recall.value:.3f} after): there is nothing for a restore to bring back."
    )


def _whole(whole: Measurement, base: Measurement | None, raw: Measurement) -> str:
    """What restoring all queries and keys does."""
    numbers = f"{raw.recall.value:.3f} to {whole.recall.value:.3f}"
    price = ""
    if raw.task is not None and whole.task is not None:
        metric = "loss" if whole.task.accuracy is None else "accuracy"
        before, after = abs(quality_of(raw.task)), abs(quality_of(whole.task))
        price = f", task {metric} from {before:.3f} to {after:.3f}"
    if whole.gain.low > 0:
        share = ""
        if base is not None and base.gain.value > 0:
            share = f", {min(1.0, whole.gain.value / base.gain.value):.0%} of what was lost"
        return f"Restoring queries and keys whole takes recall from {numbers}{share}{price}."
    if base is not None and base.gain.low > 0:
        return (
            f"Restoring queries and keys whole brings no recall back beyond noise ({numbers}{price}): Q/K are not the "
            "cause on this run."
        )
    return f"Restoring queries and keys whole does not raise recall beyond noise ({numbers}{price})."


def _values_and_outputs(control: Measurement, best: Measurement) -> str:
    """How far values and output projections alone bring recall, against the best method."""
    if control.recall.value > best.recall.value:
        return (
            f"{control.name} brings back more ({control.recall.value:.3f}) than queries and keys: what changed is "
            "what attention carries, rather than where it looks."
        )
    return f"Values and outputs alone bring recall to {control.recall.value:.3f} at most ({control.name})."


def _reach(raw: Measurement) -> str:
    """How far the measurement goes: a restore that helps at 2K may fail at 64K, and the other way round."""
    longest = max((key.length for key in raw.probe.sample_keys), default=0)
    return f"Recall was measured up to {longest:,} tokens; beyond that nothing is known."


def _price(chosen: Measurement, tolerance: float, data: str) -> str:
    """What the recommended point costs in task quality, and how sure that is."""
    assert chosen.task is not None and chosen.change is not None
    accuracy = chosen.task.accuracy is not None
    sign = 1 if accuracy else -1
    low, high = sorted((sign * chosen.change.low + 0.0, sign * chosen.change.high + 0.0))  # + 0.0: no "-0.000"
    said = (
        f"Task {'accuracy' if accuracy else 'loss'} of {chosen.name} is {sign * chosen.change.value + 0.0:+.3f} "
        f"against raw (95% {low:+.3f} to {high:+.3f}, {data or f'{len(chosen.task.nll)} rows'})"
    )
    if chosen.change.low < -tolerance:
        return f"{said}; these rows cannot rule out that it costs more than the tolerance of {tolerance:g}."
    return f"{said}."


def _choice(chosen: Measurement, raw: Measurement, methods: Sequence[Measurement], tolerance: float) -> str:
    if chosen is not raw:
        return f"Recommended: {chosen.name}."
    if any(p.gain.low > 0 for p in methods):
        return (
            f"Recommended: raw. Every point with more recall costs more than {tolerance:g} of task quality; a larger "
            "tolerance would allow one."
        )
    return "Recommended: raw. No point has more recall than the tuned checkpoint beyond noise."


def rank_layers(points: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Layers restored alone, by recall gained per task quality lost; those that cost nothing first, by their gain."""
    rows: list[dict[str, Any]] = []
    for point in points:
        if point.candidate.kind != "layer" or not point.candidate.layers:
            continue
        lost = None if point.change is None else max(0.0, -point.change.value)
        ratio = None if lost is None or lost < FREE or point.gain.value <= 0 else point.gain.value / lost
        row = {"layer": point.candidate.layers[0], "gain": point.gain.value, "lost": lost, "ratio": ratio}
        rows.append(row | {"gain_low": point.gain.low, "gain_high": point.gain.high})
    return sorted(rows, key=_layer_order)


def _layer_order(row: dict[str, Any]) -> tuple[int, float]:
    if row["gain"] <= 0:
        return 2, -row["gain"]
    return (0, -row["gain"]) if row["ratio"] is None else (1, -row["ratio"])


def _beats(other: Measurement, point: Measurement) -> bool:
    """At least as good on both axes and better on one."""
    mine = (point.recall.value, point.quality.value if point.quality else 0.0)
    theirs = (other.recall.value, other.quality.value if other.quality else 0.0)
    return theirs != mine and all(a >= b for a, b in zip(theirs, mine, strict=True))


def _task_intervals(task: TaskResult, raw: TaskResult, rows: Any) -> tuple[Interval, Interval]:
    """Task quality and its paired difference from raw: of counts in closed form, of losses by bootstrap."""
    value = quality_of(task)
    if task.exact is not None and raw.exact is not None:
        pairs = list(zip(raw.exact, task.exact, strict=True))
        low, high = paired_interval(pairs.count((True, False)), pairs.count((False, True)), len(pairs))
        quality = Interval(value, *wilson(sum(task.exact), len(pairs)))
        return quality, Interval(value - quality_of(raw), -high, -low)
    mine, other = _losses(task, rows), _losses(raw, rows)
    return _interval(value, -mine), _interval(value - quality_of(raw), other - mine)


def _losses(task: TaskResult, rows: Any) -> Any:
    return np.array(task.nll)[rows].sum(1) / np.array(task.tokens, dtype=float)[rows].sum(1)


def _interval(value: float, drawn: Any) -> Interval:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high))
