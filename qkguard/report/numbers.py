"""Numbers as people read them."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def number(value: float | None) -> str:
    """Three significant digits, "-" where there is none."""
    return "-" if value is None else f"{value:.3g}"
