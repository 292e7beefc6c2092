"""A run in sentences: what happened to recall and routing, what restoring brings, what to use."""

from __future__ import annotations

from qkguard.report.run import DRIFT, ProbeRow, Run


def tell(run: Run) -> list[str]:
    """Sentences for people, each true of the files it was made from."""
    return [*_recall(run), *_restored(run), *_drift(run)]


def _recall(run: Run) -> list[str]:
    before, raw = run.last("before"), run.last("raw")
    if raw is None:
        return ["Recall was not probed after the first step (probe_steps=0, or probes were off: see the run's log)."]
    if before is None:
        return [f"Recall at step {raw.step} is {_share(raw)}; there is no probe from before training to compare with."]
    fell = f"Recall was {_share(before)} before training and is {_share(raw)} at step {raw.step}"
    if raw.change and raw.change["high"] < 0:
        out = [f"{fell}: it fell by {_points(-raw.change['value'])} ({_interval(raw, sign=-1)})."]
        out.append(_when(run, before))
    elif raw.change and raw.change["low"] > 0:
        out = [f"{fell}: it rose by {_points(raw.change['value'])} ({_interval(raw)})."]
    else:
        out = [f"{fell}: no change beyond noise{f' ({_interval(raw)})' if raw.change else ''}."]
    now, then = raw.by("length"), before.by("length")
    worst = max(then, key=lambda n: then[n].recall - now[n].recall if n in now else -1.0, default=None)
    if worst in now and len(then) > 1 and then[worst].recall > now[worst].recall:
        out.append(
            f"The largest fall by length is at {worst:,} tokens: {then[worst].recall:.2f} to {now[worst].recall:.2f}."
        )
    return [sentence for sentence in out if sentence]


def _when(run: Run, before: ProbeRow) -> str:
    """The first probe at which recall lay more than 10 points below the first one."""
    low = next((p for p in run.probes if p.weights == "raw" and p.step and p.recall < before.recall - 0.1), None)
    return f"It first lay more than 10 points below at step {low.step}." if low else ""


def _restored(run: Run) -> list[str]:
    raw, restored = run.last("raw"), run.last("restored")
    if restored is None:
        return []
    now = f"With queries and keys restored, recall at step {restored.step} is {_share(restored)}"
    change = restored.change
    if change is None or raw is None:
        return [f"{now}."]
    if change["low"] > 0:
        use = (
            f"{now}, {_points(change['value'])} above the raw weights ({_interval(restored)}). Where recall counts, "
            "the restored model is recommended; what it costs in task quality is measured by `qkguard sweep`."
        )
    elif change["high"] < 0:
        use = (
            f"{now}, {_points(-change['value'])} below the raw weights ({_interval(restored, sign=-1)}). The raw "
            "model is recommended: queries and keys are not what recall was lost through on this run."
        )
    else:
        lost = raw.change is not None and raw.change["high"] < 0
        why = (
            "queries and keys are not what it was lost through, as far as this probe can tell"
            if lost
            else ("there was no loss to repair")
        )
        use = (
            f"{now}, no different from the raw weights beyond noise ({_interval(restored)}): {why}. Use the raw model."
        )
    return [use]


def _drift(run: Run) -> list[str]:
    q, k = run.final(f"{DRIFT}q_rel"), run.final(f"{DRIFT}k_rel")
    if q is None and k is None:
        return []
    parts = [f"{name} by {value:.3g}" for name, value in (("queries", q), ("keys", k)) if value is not None]
    out = f"Relative to before training the projections moved: {' and '.join(parts)}"
    routing = run.final(f"{DRIFT}routing_rel")
    if routing is not None:
        out += f", their product, the routing, by {routing:.3g}"
    out += " (mean over softmax-attention layers)"
    kind = "routing_rel" if routing is not None else "q_rel"
    values = {label: run.final(f"{DRIFT}{label}/{kind}") for label in run.layers}
    known = {label: value for label, value in values.items() if value is not None}
    if len(known) > 1:
        most = max(known, key=lambda label: known[label])
        out += f"; most in {most.replace('_', ' ')} ({known[most]:.3g})"
    return [f"{out}."]


def _share(probe: ProbeRow) -> str:
    return f"{probe.recall:.3f}" + (f" ({probe.total.count} samples)" if probe.cells else "")


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def _interval(probe: ProbeRow, sign: int = 1) -> str:
    assert probe.change is not None
    low, high = sorted((sign * probe.change["low"], sign * probe.change["high"]))
    return f"95% {100 * low + 0:.1f} to {100 * high + 0:.1f}"  # + 0: no -0.0
