"""A run in sentences: what happened to recall and routing, what restoring brings, what to use."""

from __future__ import annotations

from math import isfinite

from qkguard.probe.words import floor_clause, is_no_difference, no_difference, points
from qkguard.report.numbers import plural
from qkguard.report.run import DRIFT, ProbeRow, Run

USE_RESTORED = (
    "Where recall counts, the restored model is recommended. `qkguard sweep` measures what it costs in task quality."
)


def describe(run: Run) -> list[str]:
    """Sentences for people, each true of the files it was made from."""
    return [*_recall(run), *_alerts(run), *_restored(run), *_retrieval(run), *_drift(run)]


def _recall(run: Run) -> list[str]:
    before, raw = run.probe_of("before"), run.probe_of("raw")
    if before is not None and before.total.at_floor:
        return [f"{_floor(before, 'Before training the model')}.", *([] if raw is None else [_alone(raw)])]
    if raw is None:
        return ["Recall was not probed after the first step (probe_steps=0, or probes were off: see the run's log)."]
    if before is None:
        return [f"{_alone(raw).rstrip('.')}; no probe from before training to compare with."]
    both = f"Recall was {_recall_of(before)} before training and is {_recall_of(raw)} at step {raw.step}"
    if raw.change is None:
        return [f"{both}.", *_worst_length(before, raw)]
    if raw.change["high"] < 0:
        fell = f"{both}: it fell by {points(-raw.change['value'])} ({_interval(raw, sign=-1)})."
        return [fell, *_first_low(run, before), *_worst_length(before, raw)]
    if raw.change["low"] > 0:
        return [f"{both}: it rose by {points(raw.change['value'])} ({_interval(raw)}).", *_worst_length(before, raw)]
    if is_no_difference(raw.change):
        return [f"{both}: {no_difference(_compared(raw))}.", *_worst_length(before, raw)]
    return [f"{both}: no change beyond noise ({_interval(raw)}).", *_worst_length(before, raw)]


def _floor(probe: ProbeRow, who: str) -> str:
    return floor_clause(round(probe.total.hits), probe.total.count, who)


def _alone(probe: ProbeRow) -> str:
    return f"Recall at step {probe.step} is {_recall_of(probe)}."


def _first_low(run: Run, before: ProbeRow) -> list[str]:
    """The first probe that found recall more than 10 points below the one before training."""
    for probe in run.probes:
        if probe.weights == "raw" and probe.step > 0 and probe.recall < before.recall - 0.1:
            return [f"It was first seen more than 10 points below at step {probe.step}."]
    return []


def _alerts(run: Run) -> list[str]:
    """The first alert: where recall fell beyond noise, also where the mean hides it."""
    alerting = next((probe for probe in run.probes if probe.falls), None)
    if alerting is None:
        return []
    told = [
        f"{fall['where'] or 'overall'} from {fall['before']:.2f} to {fall['now']:.2f} ({fall['count']} samples)"
        for fall in alerting.falls
    ]
    return [f"Alert at step {alerting.step}: recall fell beyond noise {', '.join(told)}."]


def _worst_length(before: ProbeRow, raw: ProbeRow) -> list[str]:
    """The length whose recall fell most, where there are several."""
    then, now = before.by("length"), raw.by("length")
    falls = {length: then[length].recall - now[length].recall for length in then if length in now}
    if len(then) < 2 or max(falls.values(), default=0) <= 0:
        return []
    worst = max(falls, key=falls.__getitem__)
    return [
        f"The largest fall by length is at {worst:,} tokens: from {then[worst].recall:.2f} to {now[worst].recall:.2f}."
    ]


def _restored(run: Run) -> list[str]:
    raw, restored = run.probe_of("raw"), run.probe_of("restored")
    if restored is None:
        return []
    now = f"With the restored weights, recall at step {restored.step} is {_recall_of(restored)}"
    change = restored.change
    if change is None or raw is None:
        return [f"{now}."]
    if change["low"] > 0:
        above = f"{now}, {points(change['value'])} above the raw weights ({_interval(restored)})."
        return [above, *([] if run.verdict else [USE_RESTORED])]
    if change["high"] < 0:
        return [
            f"{now}, {points(-change['value'])} below the raw weights ({_interval(restored, sign=-1)}).",
            *([] if run.verdict else ["The raw model is recommended: on this run, restoring costs recall."]),
        ]
    return [f"{now}; against the raw weights, {_like_raw(restored)}: {_why_alike(run, raw, restored)}"]


def _like_raw(restored: ProbeRow) -> str:
    assert restored.change is not None
    if is_no_difference(restored.change):
        return no_difference(_compared(restored))
    return f"no difference beyond noise ({_interval(restored)})"


def _why_alike(run: Run, raw: ProbeRow, restored: ProbeRow) -> str:
    """Why restored weights recall what raw ones recall, and which to use where that is known; ends the sentence."""
    before = run.probe_of("before")
    if before is not None and before.total.at_floor:
        return f"{_floor(before, 'the model before training')}."
    if before is None and raw.total.at_floor and restored.total.at_floor:
        return f"{_floor(raw, 'the raw model')}."
    if raw.change is None:
        return "without a probe from before training, nothing shows a loss. Use the raw model."
    if raw.change["high"] < 0:
        lost = "as far as this probe can tell, what was restored is not what recall was lost through"
        return f"{lost}. Use the raw model."
    return "there was no loss to repair. Use the raw model."


def _retrieval(run: Run) -> list[str]:
    """Which layers are restored, where the run chose them."""
    return [] if run.retrieval is None else [run.retrieval.words]


def _drift(run: Run) -> list[str]:
    moved = {name: run.last_value(DRIFT + kind) for name, kind in (("queries", "q_rel"), ("keys", "k_rel"))}
    parts = [f"{name} by {value:.3g}" for name, value in moved.items() if value is not None]
    if not parts:
        return []
    if any(value is not None and not isfinite(value) for value in moved.values()):
        return ["The queries or keys hold NaN or Inf now, so how far they moved is not known: the training diverged."]
    out = f"Relative to their size before training, the projections moved: {' and '.join(parts)}"
    routing = run.last_value(f"{DRIFT}routing_rel")
    if routing is not None:
        out += f", their product (routing) by {routing:.3g}"
    if len(run.layers) != 1:
        out += ", mean over softmax-attention layers"
    return [out + _most_moved(run, "q_rel" if routing is None else "routing_rel") + "."]


def _most_moved(run: Run, kind: str) -> str:
    """The layer that moved most, where there are several."""
    values = {label: run.last_value(f"{DRIFT}{label}/{kind}") for label in run.layers}
    known = {label: value for label, value in values.items() if value is not None}
    if len(known) < 2:
        return ""
    most = max(known, key=known.__getitem__)
    return f"; most in {most.replace('_', ' ')} ({known[most]:.3g})"


def _recall_of(probe: ProbeRow) -> str:
    return f"{probe.recall:.3f}" + (f" ({plural(probe.total.count, 'sample')})" if probe.groups else "")


def _compared(probe: ProbeRow) -> int:
    """How many samples its change is measured on; rows of earlier versions do not say."""
    assert probe.change is not None
    return int(probe.change.get("count", probe.total.count))


def _interval(probe: ProbeRow, sign: int = 1) -> str:
    assert probe.change is not None
    low, high = sorted((sign * probe.change["low"], sign * probe.change["high"]))
    return f"95% {100 * low + 0:.1f} to {100 * high + 0:.1f}"  # + 0: no -0.0
