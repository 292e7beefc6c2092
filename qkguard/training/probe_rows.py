"""What a probe of the live model leaves: metrics, rows for the page, entries of manifests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qkguard.probe.alerts import Fall
from qkguard.probe.results import AttentionMass, ProbeResult

RAW, RESTORED = "", "_restored"
"""Which weights a probe measured, as a suffix of its metrics' names."""


def line_of(result: ProbeResult, step: int, suffix: str) -> str:
    """One probe as a line of the log."""
    low, high = result.total.interval
    lengths = ", ".join(f"{n}: {group.recall:.2f}" for (n,), group in result.by("length").items())
    return (
        f"Recall{' of the restored weights' if suffix == RESTORED else ''} at step {step}: {result.recall:.3f} (95% "
        f"interval {low:.3f} to {high:.3f}; by length {lengths}), in {result.seconds:.1f} s."
    )


def metrics_of(result: ProbeResult, suffix: str = RAW) -> dict[str, float]:
    """Metric rows of one probe; `suffix` tells the restored weights' from the raw ones'."""
    name = f"qkguard/niah{suffix}"
    metrics = {f"{name}/recall": result.recall, f"{name}/answer_logprob": result.answer_logprob}
    metrics |= {f"{name}/{task}/{n}": group.recall for (task, n), group in result.by("task", "length").items()}
    if result.attention is not None:
        for kind in ("needle", "local"):
            metrics[f"qkguard/attention{suffix}/{kind}_mass"] = result.attention.mean(kind)
        metrics[f"qkguard/attention{suffix}/distance"] = result.attention.mean("distance")
    return metrics | {f"qkguard/overhead/probe{suffix}_seconds": result.seconds}


def details_of(
    result: ProbeResult, suffix: str, earlier: ProbeResult | None, falls: Sequence[Fall] = ()
) -> dict[str, Any]:
    """What `metrics.jsonl` and the page hold beside the metrics.

    `earlier` is what recall is compared with, `falls` where it has fallen beyond noise since before training. A probe
    before training that asked more samples is given once more, on those that both asked.
    """
    details: dict[str, Any] = {f"niah{suffix}_grid": _grid(result)}
    if result.attention is not None:
        layers = list(result.attention.layers)
        details[f"niah{suffix}_needle_mass"] = [
            {"length": n, "layers": layers, "heads": grid} for n, grid in result.attention.needle.items()
        ]
        details[f"niah{suffix}_attention"] = _attention_by_layer(result.attention)
    if earlier is not None:
        details[f"niah{suffix}_change"] = result.change_since(earlier)
        same = earlier.only(result.sample_keys)
        if suffix == RAW and same is not earlier:
            details["niah_before_grid"] = _grid(same)
    if falls:
        details["niah_falls"] = [fall.to_json() for fall in falls]
    return details


def _attention_by_layer(found: AttentionMass) -> list[dict[str, Any]]:
    """By length, of every layer: the two masses and the distance in tokens, means over heads."""
    return [
        {
            "length": length,
            "layers": list(found.layers),
            "needle_mass": found.by_layer("needle", length),
            "local_mass": found.by_layer("local", length),
            "distance": found.by_layer("distance", length),
        }
        for length in found.needle
    ]


def _grid(result: ProbeResult) -> list[dict[str, Any]]:
    return [
        {"task": task, "length": n, "depth": depth, "recall": group.recall, "count": group.count}
        for (task, n, depth), group in result.by("task", "length", "depth").items()
    ]


def summary_of(result: ProbeResult) -> dict[str, Any]:
    """What a manifest keeps of a probe."""
    return {k: v for k, v in result.to_json().items() if k not in ("samples", "attention", "generated")}
