"""Which rows of which tensors are queries and keys, found by what a model does.

May import `arrays` and `errors`. Public: `discover.find_attention`, `proof.prove_layout`, `names.disk_names`,
`selection.select`, and what they speak of: `spec.AttentionSpec`, `spec.ParamMap`, `spec.Block`, `rows.RowSelection`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkguard.layout.discover import find_attention as find_attention
    from qkguard.layout.names import disk_names as disk_names
    from qkguard.layout.proof import prove_layout as prove_layout
    from qkguard.layout.rows import RowSelection as RowSelection
    from qkguard.layout.selection import select as select
    from qkguard.layout.spec import AttentionSpec as AttentionSpec
    from qkguard.layout.spec import Block as Block
    from qkguard.layout.spec import ParamMap as ParamMap

# Imported on first use: the command line checks settings (`rows`) before torch is there.
_HOME = {
    "AttentionSpec": "spec",
    "Block": "spec",
    "ParamMap": "spec",
    "RowSelection": "rows",
    "disk_names": "names",
    "find_attention": "discover",
    "prove_layout": "proof",
    "select": "selection",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"qkguard.layout.{_HOME[name]}"), name)
    raise AttributeError(f"module 'qkguard.layout' has no attribute {name!r}")
