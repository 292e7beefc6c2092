"""What a sweep shows: a table, the trade-off as a picture, and a page with both."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from matplotlib.figure import Figure

from qkguard.choice.attribution import Attribution, GroupEffect
from qkguard.choice.verdict import Interval, Measurement, rank_layers
from qkguard.offline.sweep import SweepReport
from qkguard.report.numbers import short_length
from qkguard.report.page import Picture, Table, picture, render, setting_lines

_MARKS = {"base": ("#7f8c8d", "s"), "raw": ("#c0392b", "s"), "method": ("#2471a3", "o"), "control": ("#b7950b", "^")}


def shown(points: Sequence[Measurement]) -> list[Measurement]:
    """The points of the trade-off, without single layers and repetitions."""
    return [p for p in points if p.candidate.kind != "layer" and p.same_as is None]


def table(report: SweepReport) -> Table:
    """Per point: name, recall with interval, its difference from raw, recall by length, task quality, marks."""
    lengths = sorted({key[0] for key in report.points[0].probe.by("length")})
    head = ["", "recall", "95%", "vs raw", *(short_length(n) for n in lengths)]
    if report.metric:
        head += [report.metric, "95%", "vs raw"]
    rows, marked = [], None
    for i, point in enumerate(report.points):
        marked = i if point is report.recommended else marked
        by_length = point.probe.by("length")
        row = [_label(point), f"{point.recall.value:.3f}"]
        row += [f"{point.recall.low:.2f} to {point.recall.high:.2f}", f"{point.gain.value:+.3f}"]
        row += [f"{by_length[(n,)].recall:.2f}" for n in lengths]
        row += _quality_cells(point, report.metric)
        rows.append([*row, _marks(point, report)])
    return Table([*head, ""], rows, marked)


def _quality_cells(point: Measurement, metric: str | None) -> list[str]:
    """Accuracy, or loss (which is minus the quality), with its interval and its difference from raw."""
    if point.quality is None or point.change is None:
        return []
    sign = 1 if metric == "accuracy" else -1
    low, high = sorted((sign * point.quality.low, sign * point.quality.high))
    change = sign * point.change.value + 0.0  # + 0.0: no "-0.000"
    return [f"{sign * point.quality.value:.3f}", f"{low:.3f} to {high:.3f}", f"{change:+.3f}"]


def _marks(point: Measurement, report: SweepReport) -> str:
    marks = ["recommended"] if point is report.recommended else []
    if point.pareto:
        marks.append("Pareto")
    if point.same_as:
        marks.append(f"= {point.same_as}")
    return ", ".join(marks)


def _label(point: Measurement) -> str:
    return {"base": "before SFT", "raw": "after SFT (raw)"}.get(point.name, point.name)


def tradeoff_figure(report: SweepReport) -> Figure:
    """Recall against task quality with intervals, one number per point; beside it the layers restored alone."""
    layers = rank_layers(report.points)
    figure = Figure(figsize=(14.5 if layers else 10.5, 5.2), layout="constrained")
    axes = figure.subplots(1, 2 if layers else 1, squeeze=False, width_ratios=[2.4, 1] if layers else None)[0]
    if report.metric:
        _tradeoff(axes[0], report)
    else:
        _recall_alone(axes[0], report)
    if layers:
        _layers(axes[1], layers, report.metric)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Recall and task quality; recommended: {_label(report.recommended)}")
    return figure


def _tradeoff(axis: Any, report: SweepReport) -> None:
    points, loss = shown(report.points), report.metric == "loss"
    sign = -1 if loss else 1
    left, right = _limits([sign * p.quality.value for p in points if p.quality and p.candidate.kind != "base"])
    axis.set_xlim(left, right)
    places: list[tuple[float, float, str]] = []
    for number, point in enumerate(points, 1):
        assert point.quality is not None
        x, y = sign * point.quality.value, point.recall.value
        low, high = sorted((sign * point.quality.low, sign * point.quality.high))
        color, marker = _MARKS[point.candidate.kind]
        label = f"{number}  {_label(point)}"
        if not left <= x <= right:  # the base, far from everything else: at the edge, with its number
            label += f" (at {x:.3f}, {'left' if x < left else 'right'} of the picture)"
            x = low = high = min(max(x, left), right)
        axis.hlines(y, low, high, color, lw=1, alpha=0.35)
        axis.vlines(x, point.recall.low, point.recall.high, color, lw=1, alpha=0.35)
        axis.plot(x, y, marker, color=color, ms=8, alpha=0.85, label=label, clip_on=False)
        places.append((x, y, str(number)))
        if point is report.recommended:
            axis.plot(x, y, marker="*", ms=22, mfc="none", mec="#1e8449", mew=1.8)
    front = sorted((sign * p.quality.value, p.recall.value) for p in points if p.pareto and p.quality)
    axis.plot(*zip(*front, strict=True), "-", color="#2471a3", lw=1, alpha=0.4, zorder=0)
    raw = next(p for p in points if p.candidate.kind == "raw")
    assert raw.quality is not None
    limit = sign * (raw.quality.value - report.tolerance)
    axis.axvline(limit, color="#c0392b", lw=0.8, ls=":", label=f"tolerance {report.tolerance:g}")
    _number(axis, places)
    unit = "held-out loss, nats per token" if loss else "task accuracy (teacher forced)"
    axis.set(xlabel=f"{unit} ({'left' if loss else 'right'} is better)", ylabel="needle recall")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis that shows these values with some room around them."""
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, high + room


def _number(axis: Any, places: Sequence[tuple[float, float, str]]) -> None:
    """Numbers beside their points; points that lie close together share one label."""
    wide = max(p[0] for p in places) - min(p[0] for p in places) or 1.0
    high = max(p[1] for p in places) - min(p[1] for p in places) or 1.0
    groups: list[list[tuple[float, float, str]]] = []
    for place in places:
        for group in groups:
            if abs(group[0][0] - place[0]) < 0.03 * wide and abs(group[0][1] - place[1]) < 0.03 * high:
                group.append(place)
                break
        else:
            groups.append([place])
    for group in groups:
        text = ", ".join(p[2] for p in group)
        axis.annotate(text, group[0][:2], xytext=(7, 6), textcoords="offset points", fontsize=9)


def _recall_alone(axis: Any, report: SweepReport) -> None:
    points = shown(report.points)[::-1]
    values = [p.recall.value for p in points]
    spread = _spread([(p.recall.value, p.recall.low, p.recall.high) for p in points])
    colors = [_MARKS[p.candidate.kind][0] for p in points]
    axis.barh(range(len(points)), values, xerr=spread, color=colors, alpha=0.85)
    axis.set_yticks(range(len(points)), [_label(p) for p in points])
    axis.set(xlabel="needle recall (95% interval); task quality was not measured")


def _spread(intervals: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """(value, low, high) as lengths of error bars, below and above; rounding may put a bound on the wrong side."""
    below = [max(0.0, value - low) for value, low, _ in intervals]
    above = [max(0.0, high - value) for value, _, high in intervals]
    return [below, above]


def _layers(axis: Any, layers: Sequence[dict[str, Any]], metric: str | None) -> None:
    rows = sorted(layers, key=itemgetter("layer"), reverse=True)
    places = range(len(rows))
    spread = _spread([(r["gain"], r["gain_low"], r["gain_high"]) for r in rows])
    gains = [r["gain"] for r in rows]
    axis.barh([p + 0.2 for p in places], gains, 0.4, xerr=spread, color="#2471a3", label="recall gained")
    if metric:
        lost = [r["lost"] for r in rows]
        axis.barh([p - 0.2 for p in places], lost, 0.4, color="#c0392b", label=f"{metric} lost")
    axis.set_yticks(places, [f"layer {r['layer']}" for r in rows])
    axis.set_title("one layer restored at a time", fontsize="medium")
    axis.legend(fontsize=8)


def html_page(report: SweepReport) -> str:
    """A page that needs nothing else: what was found, the picture, the table, the layers, the settings."""
    settings = {"base": report.base, "tuned": report.tuned} | report.settings
    return render(
        "sweep",
        "Recall against task quality",
        report=report,
        tradeoff=picture(
            tradeoff_figure(report), "Recall against task quality. The star marks the recommended point."
        ),
        points=table(report),
        layers=_layer_table(report),
        attribution=report.attribution,
        groups=None if report.attribution is None else attribution_table(report.attribution, report.metric),
        effects=_effects_picture(report.attribution),
        settings=setting_lines(settings),
    )


def _layer_table(report: SweepReport) -> Table | None:
    """The layers restored alone, best first."""
    head = ["", "recall gained", "95%", f"{report.metric or 'task'} lost", "ratio"]
    rows = []
    for layer in rank_layers(report.points):
        spread = f"{layer['gain_low']:+.2f} to {layer['gain_high']:+.2f}"
        lost, ratio = (_fixed(layer[key]) for key in ("lost", "ratio"))
        rows.append([f"layer {layer['layer']}", f"{layer['gain']:+.3f}", spread, lost, ratio])
    return Table(head, rows) if rows else None


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def attribution_table(found: Attribution, metric: str | None) -> Table:
    """Per group of weights: its size; taken back alone, and left from SFT alone: recall, its difference, the task."""
    head = ["", "weights", "recall: taken back alone", "vs raw", "95%", *([metric] if metric else [])]
    head += ["recall: left from SFT alone", "vs base", "95%", *([metric] if metric else [])]
    rows, marked = [], None
    for number, effect in enumerate(found.effects):
        if found.cause[:1] == [effect.group.key]:
            marked = number
        rows.append([effect.group.title, f"{effect.group.elements:,}", *_effect_cells(effect, metric)])
    return Table(head, rows, marked)


def _effect_cells(effect: GroupEffect, metric: str | None) -> list[str]:
    if effect.back is None or effect.alone is None:
        return ["not changed by SFT", *([""] * (7 if metric else 5))]
    falls = Interval(-effect.costs.value + 0.0, -effect.costs.high, -effect.costs.low)
    cells = []
    for point, change in ((effect.back, effect.brings), (effect.alone, falls)):
        cells += [f"{point.recall.value:.3f}", f"{change.value:+.3f}", f"{change.low:+.2f} to {change.high:+.2f}"]
        cells += _quality_cells(point, metric)[:1]
    return cells


def _effects_picture(found: Attribution | None) -> Picture | None:
    """What each group brings back alone, and what it loses alone, as bars."""
    effects = [] if found is None else [effect for effect in found.effects if effect.back is not None][::-1]
    if not effects:
        return None
    figure = Figure(figsize=(9.5, 1.4 + 0.7 * len(effects)), layout="constrained")
    axis = figure.subplots()
    for shift, color, name in ((0.2, "#2471a3", "brings"), (-0.2, "#c0392b", "costs")):
        intervals: list[Interval] = [getattr(effect, name) for effect in effects]
        places = [place + shift for place in range(len(effects))]
        spread = _spread([(one.value, one.low, one.high) for one in intervals])
        label = {"brings": "brings back, taken back alone", "costs": "loses, left from SFT alone"}[name]
        look: dict[str, Any] = {"color": color, "ecolor": "#7f8c8d", "label": label}
        axis.barh(places, [one.value for one in intervals], 0.4, xerr=spread, **look)
    axis.set_yticks(range(len(effects)), [effect.group.title for effect in effects])
    axis.set(xlabel="needle recall (95% interval)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return picture(figure, "What each group of weights brings back, and what it loses.")
