"""qkguard: keep long-range recall through chain-of-thought SFT."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qkguard.callback import QKGuardCallback
    from qkguard.checkpoint.offline import restore_checkpoint
    from qkguard.checkpoint.verification import verify
    from qkguard.config import QKGuardConfig
    from qkguard.drift_offline import drift_report
    from qkguard.errors import QKGuardError
    from qkguard.layout import AttentionSpec, find_attention
    from qkguard.lora.merge import merge_adapter
    from qkguard.swap import restored
    from qkguard.sweeping import sweep

# public name -> module, imported on first use: the command line must start faster than torch and transformers import
_WHERE = {
    "AttentionSpec": "layout",
    "QKGuardCallback": "callback",
    "QKGuardConfig": "config",
    "QKGuardError": "errors",
    "drift_report": "drift_offline",
    "find_attention": "layout",
    "merge_adapter": "lora.merge",
    "restore_checkpoint": "checkpoint.offline",
    "restored": "swap",
    "sweep": "sweeping",
    "verify": "checkpoint.verification",
}

__all__ = [
    "AttentionSpec",
    "QKGuardCallback",
    "QKGuardConfig",
    "QKGuardError",
    "__version__",
    "drift_report",
    "find_attention",
    "merge_adapter",
    "restore_checkpoint",
    "restored",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"qkguard.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'qkguard' has no attribute {name!r}")
