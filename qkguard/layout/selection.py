"""The rows that a `RowSelection` chooses in a layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qkguard.errors import QKGuardError
from qkguard.layout.rows import RowSelection
from qkguard.layout.spec import AttentionSpec, Block, ParamMap, join_ranges

Selection = Sequence[tuple[AttentionSpec, tuple[ParamMap, ...]]]
"""Layers and, in each, the rows to restore, as `select` gives them."""


def select(
    specs: Sequence[AttentionSpec], rows: RowSelection | None = None
) -> list[tuple[AttentionSpec, tuple[ParamMap, ...]]]:
    """The rows to restore, layer by layer: every parameter once, under the first layer that owns it.

    Raises:
        QKGuardError: `rows.layers` names one without softmax attention, or shared rows are there and refused.
    """
    rows = rows or RowSelection()
    if rows.layers is not None and (unknown := sorted(set(rows.layers) - {spec.layer for spec in specs})):
        known = ", ".join(str(spec.layer) for spec in specs)
        raise QKGuardError(f"layers {unknown} have no softmax attention; those that have it: {known}")
    wanted = set(rows.projections) | ({"v"} if rows.shared == "restore" else set())

    def keep(block: Block) -> bool:
        return set(block.role) <= wanted and block.role != "v"

    out, seen = [], set()
    for spec in specs:
        if rows.layers is not None and spec.layer not in rows.layers:
            continue
        if spec.sliding and not rows.include_sliding_window:
            continue
        if rows.shared == "refuse" and (names := [p.name for p in spec.params if any(b.shared for b in p.blocks)]):
            raise QKGuardError(
                f"{', '.join(names)}: rows feed keys and values alike, so they cannot be restored alone; "
                'set shared to "keep" (leave them tuned) or "restore" (take them back with the values)'
            )
        maps = []
        for param in spec.params:
            if param.name in seen or (param.kind == "norm" and not rows.include_norms):
                continue
            param = param.only(keep)
            if param.blocks:
                seen.add(param.name)
                maps.append(param)
        if maps:
            out.append((spec, tuple(maps)))
    return out


def unselected_norms(selection: Selection) -> list[ParamMap]:
    """The q/k norms of selected layers that are not selected themselves: they stay as tuned."""
    chosen = {param.name for _, maps in selection for param in maps}
    norms = {p.name: p for spec, _ in selection for p in spec.params if p.kind == "norm" and p.name not in chosen}
    return list(norms.values())


def show_layers(numbers: Iterable[int | None], most: int | None = None) -> str:
    """Layer numbers for people: [0, 1, 2, 3, 7] -> "0-3, 7"; at most `most` of these pieces, where it is given."""
    known = [number for number in numbers if number is not None]
    runs = join_ranges((number, number + 1) for number in known)
    shown = ", ".join(str(lo) if hi - lo == 1 else f"{lo}-{hi - 1}" for lo, hi in runs[:most])
    return shown if most is None or len(runs) <= most else f"{shown}, ... ({len(known)} layers)"
