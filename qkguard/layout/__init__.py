"""Which tensors, and which of their rows, are queries and keys, layer by layer."""

from qkguard.layout.discover import find_attention
from qkguard.layout.names import disk_names
from qkguard.layout.spec import AttentionSpec, Block, ParamMap, select
from qkguard.layout.verify import verify_layout

__all__ = ["AttentionSpec", "Block", "ParamMap", "disk_names", "find_attention", "select", "verify_layout"]
