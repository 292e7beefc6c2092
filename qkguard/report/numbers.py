"""Numbers as people read them."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: float | None, digits: int = 3) -> str:
    """A value to so many significant digits, "-" where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"


def plural(count: int, noun: str) -> str:
    """1, "folder" -> "1 folder"; 1200, "folder" -> "1,200 folders"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def short_length(tokens: int) -> str:
    """1536 -> "1.5K", 131072 -> "128K"."""
    return f"{tokens / 1024:.3g}K" if tokens >= 1024 else str(tokens)
