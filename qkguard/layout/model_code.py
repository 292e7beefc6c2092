"""torch and the model code of transformers, imported with Python's garbage collector at rest."""

from __future__ import annotations

import atexit
import gc
import sys
from importlib import import_module


def nothing() -> None:
    """Where nothing is to be done before an import."""


def import_model_code() -> None:
    """Import torch and what all model classes of transformers need; does nothing where they are there.

    The import makes a million objects, and all of them stay: looking through them again and again for what could be
    freed is a tenth of its time.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    was_on = gc.isenabled()
    gc.disable()
    try:
        import_module("transformers.modeling_utils")
    finally:
        if was_on:
            gc.enable()


def leave_without_collecting() -> None:
    """Let this process end without a last look through those objects, which takes most of a second.

    For commands whose files are closed by then: what only the collector would close at the end stays open.
    """
    atexit.register(gc.freeze)
