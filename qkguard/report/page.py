"""Self-contained HTML pages from the templates beside this file, and what these show: tables and pictures."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

_INK = {"light": ("#1b1f24", "#ffffff"), "dark": ("#d7dce2", "#14181d")}


@dataclass(frozen=True)
class Table:
    """Cells as text. The row with the index `marked` stands out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None


@dataclass(frozen=True)
class Picture:
    """A PNG for light pages and one for dark ones, in base64; the width in CSS pixels."""

    caption: str
    light: str
    dark: str
    width: int


def render(template: str, title: str, **values: Any) -> str:
    """The page that `templates/<template>.html` makes of these values; whatever they hold is escaped."""
    return _templates().get_template(f"{template}.html").render(title=title, **values)


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("qkguard.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def setting_lines(settings: Mapping[str, Any]) -> list[str]:
    """One line per setting: "lengths: 512, 1024"."""
    lines = []
    for key, value in settings.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        lines.append(f"{key}: {text}")
    return lines


def picture(figure: Figure, caption: str, file: Path | None = None) -> Picture:
    """A figure in the reader's colours; the light PNG also goes to `file`."""
    light = themed_png(figure, "light")
    figure.set_layout_engine("none")  # everything keeps its place; finding it again would take half of the time
    dark = themed_png(figure, "dark")
    if file is not None:
        file.write_bytes(light)
    return Picture(caption, b64encode(light).decode(), b64encode(dark).decode(), round(figure.get_figwidth() * 100))


def themed_png(figure: Figure, theme: str = "light", dpi: int = 150) -> bytes:
    """PNG bytes with ink and background of the "light" or "dark" theme."""
    ink, paper = _INK[theme]
    figure.set_facecolor(paper)
    for axis in figure.axes:
        axis.set_facecolor(paper)
        axis.tick_params(colors=ink, which="both")
        for spine in axis.spines.values():
            spine.set_edgecolor(ink)
        legend = axis.get_legend()
        if legend is not None:
            legend.get_frame().set_facecolor(paper)
    # Numbers written on a heatmap keep the ink that suits their cells.
    on_images = {text for axis in figure.axes if axis.images for text in axis.texts}
    for text in set(figure.findobj(Text)) - on_images:
        text.set_color(ink)
    buffer = BytesIO()
    figure.set_dpi(dpi)
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
