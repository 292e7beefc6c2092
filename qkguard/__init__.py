"""qkguard: keep long-range recall through chain-of-thought SFT."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qkguard.choice.swap import restored
    from qkguard.errors import QKGuardError
    from qkguard.layout import AttentionSpec, find_attention
    from qkguard.offline.drift_report import drift_report
    from qkguard.offline.merge import merge_adapter
    from qkguard.offline.restore import restore_checkpoint
    from qkguard.offline.sweep import sweep
    from qkguard.offline.verify import verify
    from qkguard.training.callback import QKGuardCallback
    from qkguard.training.config import QKGuardConfig

# Public name -> its module, imported on first use: the command line must start before torch and transformers do.
_HOME = {
    "AttentionSpec": "layout",
    "QKGuardCallback": "training.callback",
    "QKGuardConfig": "training.config",
    "QKGuardError": "errors",
    "drift_report": "offline.drift_report",
    "find_attention": "layout",
    "merge_adapter": "offline.merge",
    "restore_checkpoint": "offline.restore",
    "restored": "choice.swap",
    "sweep": "offline.sweep",
    "verify": "offline.verify",
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
    if name in _HOME:
        return getattr(import_module(f"qkguard.{_HOME[name]}"), name)
    raise AttributeError(f"module 'qkguard' has no attribute {name!r}")
