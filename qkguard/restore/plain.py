"""`restore`: queries and keys exactly as before SFT (QK-Restore, arXiv 2606.11052)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from qkguard.layout.spec import AttentionSpec, ParamMap


class Restored(NamedTuple):
    """New compact tensors by parameter name, and what the method did to this layer (JSON values)."""

    rows: dict[str, Tensor]
    report: dict[str, Any]


def restore(
    spec: AttentionSpec, maps: Sequence[ParamMap], pre: Mapping[str, Tensor], post: Mapping[str, Tensor]
) -> Restored:
    """W_Q and W_K (and their biases) become `pre`; nothing of `post` stays in the selected rows."""
    return Restored({param.name: pre[param.name] for param in maps}, {})
