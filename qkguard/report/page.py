"""One self-contained HTML page: light and dark, readable on a phone, nothing fetched from anywhere."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

_INK = {"light": ("#1b1f24", "#ffffff"), "dark": ("#d7dce2", "#14181d")}
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#ffffff;--line:#d8dee4;--soft:#f4f6f8;--mark:#e6f4ea}
@media (prefers-color-scheme:dark){:root{--ink:#d7dce2;--paper:#14181d;--line:#333a42;--soft:#1d232a;--mark:#1c3326}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0 auto;max-width:60rem;
padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}img{max-width:100%;height:auto}figure{margin:1rem 0}
figcaption{font-size:.85rem;opacity:.8}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.25rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td:first-child,th:first-child{text-align:left}code{overflow-wrap:anywhere}
pre{background:var(--soft);padding:.7rem;overflow-x:auto;font-size:.85rem}.marked{background:var(--mark)}
.facts{display:flex;flex-wrap:wrap;gap:.7rem}.facts div{background:var(--soft);padding:.6rem 1rem;border-radius:.4rem}
.facts b{display:block;font-size:1.3rem}
"""


def page(title: str, *parts: str) -> str:
    """The page from its parts, which are HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def bullets(sentences: Iterable[str]) -> str:
    """A list of plain sentences; nothing for none."""
    items = "".join(f"<li>{escape(text)}</li>" for text in sentences)
    return f"<ul>{items}</ul>" if items else ""


def facts(values: Iterable[tuple[str, str]]) -> str:
    """Large numbers with their names."""
    return f"<div class=facts>{''.join(f'<div><b>{escape(v)}</b>{escape(n)}</div>' for n, v in values)}</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], marked: Iterable[int] = ()) -> str:
    """A table that scrolls by itself where it is too wide; rows with an index in `marked` stand out."""
    chosen = set(marked)
    title = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr{' class=marked' if i in chosen else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for i, row in enumerate(rows)
    )
    return f"<div class=wide><table><tr>{title}</tr>{body}</table></div>"


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def picture(figure: Figure, caption: str, file: Path | None = None) -> str:
    """A figure in the reader's colours: one PNG for light pages, which also goes to `file`, one for dark ones."""
    images = {theme: themed_png(figure, theme) for theme in ("light", "dark")}
    if file is not None:
        file.write_bytes(images["light"])
    light, dark = (b64encode(image).decode() for image in images.values())
    width = round(figure.get_figwidth() * 100)
    return (
        f'<figure><picture><source media="(prefers-color-scheme:dark)" srcset="data:image/png;base64,{dark}">'
        f'<img width="{width}" alt="{escape(caption)}" src="data:image/png;base64,{light}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def themed_png(figure: Figure, theme: str = "light", dpi: int = 150) -> bytes:
    """PNG bytes with ink and background of the "light" or "dark" theme."""
    ink, paper = _INK[theme]
    figure.set_facecolor(paper)
    for axis in figure.axes:
        axis.set_facecolor(paper)
        axis.tick_params(colors=ink, which="both")
        for spine in axis.spines.values():
            spine.set_edgecolor(ink)
        if legend := axis.get_legend():
            legend.get_frame().set_facecolor(paper)
    on_images = {text for axis in figure.axes if axis.images for text in axis.texts}  # inked for their cells
    for text in set(figure.findobj(Text)) - on_images:
        text.set_color(ink)
    buffer = BytesIO()
    figure.set_dpi(dpi)
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
