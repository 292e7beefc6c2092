"""Writes docs/SUPPORTED_MODELS.md: what `find_attention` says of every causal-LM type of transformers.

python docs/supported_models.py
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers

from qkguard import QKGuardError, find_attention
from qkguard.layout import AttentionSpec, ParamMap
from tests.support import zoo

TARGET = Path(__file__).with_name("SUPPORTED_MODELS.md")
INTRO = """\
# Supported models

What `qkguard inspect` finds in every causal-LM type of transformers {version}, on a tiny config of each, by what the
model does: none of it comes from a list of names, so a new type is treated in the same way.
Written by `python docs/supported_models.py`; `tests/layout/test_zoo.py` checks each row map against an
independent computation, `tests/offline/test_zoo.py` restores a checkpoint of each and compares bits, queries,
keys and values.

- **exact**: all rows that make queries and keys are restored, nothing else.
- **partial**: some rows feed keys and values alike. By default they stay tuned (`shared="keep"`), with `"restore"`
  they go back with their values.
- **refused**: there are no queries and keys to restore, or they cannot be established for certain.

Types whose configs come in several kinds (windows, shared keys and values, fused or not) are tested in more of them
than the table shows. Of {total} types {exact} are exact, {partial} partial, {refused} refused.

| type | | where queries and keys are |
|---|---|---|
"""


def main() -> None:
    TARGET.write_text(document(), encoding="utf-8")


def document() -> str:
    """The text of SUPPORTED_MODELS.md."""
    logging.disable(logging.WARNING)
    rows = {name: describe(name) for name in sorted(zoo.CONFIGS)}
    counts = {kind: sum(row[0] == kind for row in rows.values()) for kind in ("exact", "partial", "refused")}
    intro = INTRO.format(version=transformers.__version__, total=len(rows), **counts)
    return intro + "".join(f"| {name} | {kind} | {text} |\n" for name, (kind, text) in rows.items())


def describe(model_type: str) -> tuple[str, str]:
    """(exact, partial or refused; the reason or the place) of one type."""
    try:
        specs = find_attention(zoo.tiny_config(model_type))
    except QKGuardError as error:
        return "refused", " ".join(str(error).split()).replace("|", "\\|")
    return describe_specs(specs)


def describe_specs(specs: list[AttentionSpec]) -> tuple[str, str]:
    """(exact or partial; the place) of a layout."""
    text = "; ".join(dict.fromkeys(map(place, specs)))
    params = [param for spec in specs for param in spec.params if param.kind != "norm"]
    shared = {_last(param.name) for param in params if any(block.shared for block in param.blocks)}
    if not shared:
        return "exact", text
    return "partial", f"{text}; rows of {', '.join(sorted(shared))} feed keys and values"


def place(spec: AttentionSpec) -> str:
    """The weights that make one layer's queries and keys, and how they lie there."""
    kinds = {}
    for param in sorted(spec.params, key=_queries_first):
        if param.kind != "weight":
            continue
        roles = "".join(r for r in "qkv" if any(r in b.role for b in param.blocks))
        rows = sum(stop - start for start, stop in param.ranges)
        part = "" if rows == param.shape[param.dim] else f" {rows} of {param.shape[param.dim]}"
        unit = ("columns" if param.dim else "rows") if part else ""
        kinds[f"`{_last(param.name)}`"] = f"{roles}{part} {unit}".strip()
    return ", ".join(f"{name} ({what})" for name, what in kinds.items())


def _queries_first(param: ParamMap) -> bool:
    return all(block.role != "q" for block in param.blocks)


def _last(name: str) -> str:
    return ".".join(part for part in name.split(".")[-2:] if part != "weight")


if __name__ == "__main__":
    main()
