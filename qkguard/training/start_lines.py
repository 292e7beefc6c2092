"""Lines of the log at the start of a run, as far as full weights and adapters share them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qkguard.layout.selection import show_layers
from qkguard.report.run import METRICS
from qkguard.training.schedules import pace

if TYPE_CHECKING:
    from qkguard.training.config import QKGuardConfig


def measuring_line(config: QKGuardConfig, report_to: Sequence[str]) -> str:
    """How often drift is measured, and where the numbers go."""
    return (
        f"Drift: {pace(config.drift_steps)}. Routing drift: {pace(config.routing_drift_steps)}. "
        f"Metrics go to {', '.join([METRICS, *report_to])}."
    )


def saving_line(what: str, config: QKGuardConfig, place: str, final: Path, also: str = "") -> str:
    """When restored models of a kind (`what`) are written to `place` and to `final`."""
    exports = config.final_export and config.restore_on != "never"
    saves = {"save": f"{place} at every save", "best": f"{place} at every best save"}
    when = [saves.get(config.restore_on, "none before the end" if exports else "none")]
    if exports:
        when.append(f"final models in {final}")
    if also:
        when.append(also)
    method = "restore, the final one by verdict" if config.method == "auto" else config.method
    return f"{what} ({method}): {', '.join(when)}."


def layers_of(layers: Iterable[int | None], total: int | None) -> str:
    """ "2 softmax-attention layers (1, 3) of 4 layers"."""
    layers = list(layers)
    of_total = f" of {total} layers" if total else ""
    return f"{len(layers)} softmax-attention layers ({show_layers(layers)}){of_total}"


def size_of(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
