"""What `qkguard probe` shows of its reports: a heatmap, and a page with it and the table."""

from __future__ import annotations

from collections.abc import Sequence

from qkguard.offline.probe import ModelReport
from qkguard.report.heatmaps import attention_heatmap, recall_heatmap
from qkguard.report.numbers import short_length
from qkguard.report.page import Table, picture, render, setting_lines, themed_png


def heatmap_png(reports: Sequence[ModelReport]) -> bytes:
    """Recall by length and depth, a panel per model."""
    return themed_png(recall_heatmap({report.name: report.result for report in reports}))


def html_page(reports: Sequence[ModelReport]) -> str:
    """A page that needs nothing else: the table by task and length, heatmaps, attention, settings."""
    pictures = [picture(recall_heatmap({r.name: r.result for r in reports}), "Recall by length and depth.")]
    for report in reports:
        if report.result.attention is not None:
            pictures.append(picture(attention_heatmap(report.result.attention), f"Attention: {report.name}."))
    return render(
        "probe",
        "Needle-in-a-haystack recall",
        recall=_recall_table(reports),
        warnings=[warning for report in reports for warning in report.warnings],
        pictures=pictures,
        settings=setting_lines({k: v for k, v in reports[0].result.settings.items() if k != "model"}),
    )


def _recall_table(reports: Sequence[ModelReport]) -> Table:
    """Recall with its 95% interval by task and length, a column per model."""
    by_place = [report.result.by("task", "length") for report in reports]
    rows = []
    for task, length in sorted({place for groups in by_place for place in groups}):
        found = [groups.get((task, length)) for groups in by_place]
        cells = ["" if group is None else _percent(group.recall, group.interval) for group in found]
        rows.append([task, short_length(length), *cells])
    rows.append(["all", "", *(_percent(r.result.recall, r.result.total.interval) for r in reports)])
    return Table(["task", "length", *(report.name for report in reports)], rows, marked=len(rows) - 1)


def _percent(recall: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{recall:.1%} ({low:.0%} to {high:.0%})"
