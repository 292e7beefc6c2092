"""What results of probes are called, in logs, pages and cards alike."""

from __future__ import annotations

from collections.abc import Mapping


def floor_clause(hits: int, count: int, who: str = "the base") -> str:
    """What is said where a probe can show no loss (`statistics.at_floor`), as a clause without a full stop."""
    found = f"finds no needles here (0 of {count})" if hits == 0 else f"finds only {hits} of {count} needles here"
    return f"{who} {found}, so this probe cannot show a loss"


def points(share: float) -> str:
    """0.123 -> "12.3 points"."""
    return f"{100 * share + 0:.1f} points"  # + 0: no -0.0


def is_no_difference(change: Mapping[str, float]) -> bool:
    """Whether a paired difference is shown as none: to a tenth of a point, which no two probes of fewer than a
    thousand samples differ by.
    """
    return round(abs(change["value"]), 3) == 0


def no_difference(count: int) -> str:
    """What is said of two probes that found the same."""
    return f"no difference measured ({count:,} sample{'' if count == 1 else 's'})"


def change_in_points(change: Mapping[str, float]) -> str:
    """A paired difference with its 95% interval: "+12.0 points (95% +4.1 to +19.5)"."""
    if is_no_difference(change):
        return no_difference(int(change["count"])) if "count" in change else "no difference measured"
    value, low, high = (100 * change[key] + 0 for key in ("value", "low", "high"))
    return f"{value:+.1f} points (95% {low:+.1f} to {high:+.1f})"
