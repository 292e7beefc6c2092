"""`restore`: queries and keys exactly as before SFT (QK-Restore, arXiv 2606.11052)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qkguard.arrays import Array
from qkguard.layout.spec import AttentionSpec, ParamMap


class Restored(NamedTuple):
    """New compact arrays by parameter name, and what the method did to this layer (JSON values)."""

    rows: dict[str, Array]
    report: dict[str, Any]


def restore(
    spec: AttentionSpec, maps: Sequence[ParamMap], pre: Mapping[str, Array], post: Mapping[str, Array]
) -> Restored:
    """W_Q and W_K (and their biases) become `pre`; nothing of `post` stays in the selected rows."""
    return Restored({param.name: pre[param.name] for param in maps}, {})
