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
    _check_layers(specs, rows)
    wanted = set(rows.projections) | ({"v"} if rows.shared == "restore" else set())

    def is_wanted(block: Block) -> bool:
        return wanted.issuperset(block.role)

    out, seen = [], set()
    for spec in specs:
        if rows.layers is not None and spec.layer not in rows.layers:
            continue
        if spec.sliding and not rows.include_sliding_window:
            continue
        if rows.shared == "refuse":
            _refuse_shared(spec)
        maps = []
        for param in spec.params:
            if param.name in seen or (param.kind == "norm" and not rows.include_norms):
                continue
            chosen = param.only(is_wanted)
            if chosen.blocks:
                seen.add(param.name)
                maps.append(chosen)
        if maps:
            out.append((spec, tuple(maps)))
    return out


def _check_layers(specs: Sequence[AttentionSpec], rows: RowSelection) -> None:
    unknown = set(rows.layers or ()) - {spec.layer for spec in specs}
    if unknown:
        known = show_layers(spec.layer for spec in specs)
        raise QKGuardError(f"Layers {sorted(unknown)} have no softmax attention; those that have it: {known}")


def _refuse_shared(spec: AttentionSpec) -> None:
    names = [param.name for param in spec.params if any(block.shared for block in param.blocks)]
    if names:
        raise QKGuardError(
            f"{', '.join(names)}: rows feed keys and values alike, so they cannot be restored alone; set shared to "
            '"keep" (leave them tuned) or "restore" (take them back with the values)'
        )


def unselected_norms(selection: Selection) -> list[ParamMap]:
    """The q/k norms of selected layers that are not selected themselves: they stay as tuned."""
    chosen = {param.name for _, maps in selection for param in maps}
    norms: dict[str, ParamMap] = {}
    for spec, _ in selection:
        norms.update({param.name: param for param in spec.params if param.kind == "norm" and param.name not in chosen})
    return list(norms.values())


def up_to_layer(name: str) -> str | None:
    """The beginning of a dotted name up to its first number, "model.layers.3.self_attn" -> "model.layers.3"; None
    where it has none.
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])


def show_layers(layers: Iterable[int | None], most: int | None = None) -> str:
    """Layer numbers for people: [0, 1, 2, 3, 7] -> "0-3, 7"; at most `most` of these ranges, where it is given."""
    known = [layer for layer in layers if layer is not None]
    ranges = join_ranges((layer, layer + 1) for layer in known)
    shown = ", ".join(str(lo) if hi - lo == 1 else f"{lo}-{hi - 1}" for lo, hi in ranges[:most])
    return shown if most is None or len(ranges) <= most else f"{shown}, ... ({len(known)} layers)"
