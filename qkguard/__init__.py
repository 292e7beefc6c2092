"""qkguard: keep long-range recall through chain-of-thought SFT."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qkguard.callback import QKGuardCallback
    from qkguard.config import QKGuardConfig
    from qkguard.errors import QKGuardError
    from qkguard.layout import AttentionSpec, find_attention

# public name -> module, imported on first use: the command line must start faster than torch and transformers import
_WHERE = {
    "AttentionSpec": "layout",
    "QKGuardCallback": "callback",
    "QKGuardConfig": "config",
    "QKGuardError": "errors",
    "find_attention": "layout",
}

__all__ = ["AttentionSpec", "QKGuardCallback", "QKGuardConfig", "QKGuardError", "__version__", "find_attention"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"qkguard.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'qkguard' has no attribute {name!r}")
