"""What trackers show first: at most ten headline charts in the section `qkguard`, details in sections of their own.

W&B, TensorBoard, MLflow and trackio make one section of what stands before the first slash of a name, and one chart
of each name. A model of 36 layers has some 290 names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qkguard.report.run import Run

LAYERS, OVERHEAD, TASKS, VERDICT, PICTURES = (
    f"qkguard_{section}" for section in ("layers", "overhead", "tasks", "verdict", "pictures")
)
"""Sections beside `qkguard`."""

_SECTIONS = {
    LAYERS: re.compile(r"qkguard/(\w+/layer_.+)"),
    OVERHEAD: re.compile(r"qkguard/overhead/(.+)"),
    TASKS: re.compile(r"qkguard/(niah\w*/\w+/\d+)"),
    VERDICT: re.compile(r"qkguard/verdict/(.+)"),
}

LINES = {
    "recall": {"raw": "qkguard/niah/recall", "restored": "qkguard/niah_restored/recall"},
    "attention": {
        f"{kind}, {weights}": f"qkguard/attention{suffix}/{kind}_mass"
        for weights, suffix in (("raw", ""), ("restored", "_restored"))
        for kind in ("needle", "local")
    },
}
"""Headline charts of several lines: chart -> line -> metric. These metrics have no charts of their own."""

UNCHARTED = [
    *(metric for lines in LINES.values() for metric in lines.values()),
    "qkguard/niah_restored/answer_logprob",
    "qkguard/attention/distance",
    "qkguard/attention_restored/distance",
]
"""Logged, but shown in a chart with others or left for people to add."""


@dataclass(frozen=True)
class Chart:
    """`lines`: name -> [(step, value)]."""

    title: str
    lines: Mapping[str, Sequence[tuple[int, float]]]


def tracker_name(metric: str) -> str:
    """The name under which trackers get a metric of `metrics.jsonl`.

    >>> tracker_name("qkguard/drift/layer_3/q_rel"), tracker_name("qkguard/drift/q_rel")
    ('qkguard_layers/drift/layer_3/q_rel', 'qkguard/drift/q_rel')
    """
    for section, pattern in _SECTIONS.items():
        if found := pattern.fullmatch(metric):
            return f"{section}/{found[1]}"
    return metric


def line_charts(run: Run) -> dict[str, Chart]:
    """The headline charts of several lines that a run has numbers for, by name."""
    charts: dict[str, Chart] = {}
    for name, lines in LINES.items():
        found = {line: run.series(metric) for line, metric in lines.items()}
        found = {line: series for line, series in found.items() if series}
        if name == "recall" and (before := run.probe_of("before")) is not None:
            last = max((step for series in found.values() for step, _ in series), default=0)
            found = {"before training": [(0, before.recall), (last, before.recall)], **found}
        if found:
            charts[name] = Chart(_TITLES[name], found)
    return charts


def verdict_bars(run: Run) -> tuple[str, list[tuple[str, float]]] | None:
    """A title that names the recommended model, and (model, recall) of all that the verdict measured."""
    if run.verdict is None:
        return None
    bars = [(point["name"], point["recall"]["value"]) for point in run.verdict["points"]]
    return f"Recall at the end; recommended: {run.verdict['recommended']}", bars


_TITLES = {
    "recall": "Recall before training, of raw and of restored weights",
    "attention": "Attention of answers on the needle, and on near tokens",
}
