"""torch and the model code of transformers, imported while Python's garbage collector looks up rarely."""

from __future__ import annotations

import gc
import sys
from importlib import import_module

RARELY = 20_000  # new objects between two looks: 700 at the start of Python 3.11


def nothing() -> None:
    """Where nothing is to be done before an import."""


def import_model_code() -> None:
    """Import torch and what all model classes of transformers need; does nothing where they are there.

    The import makes a million objects, and nearly all of them stay: looking through them again and again for what
    could be freed takes a sixth of its time. Without any look all would be young, and gone through right after it.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    before = gc.get_threshold()
    gc.set_threshold(max(RARELY, before[0]) if before[0] else 0, *before[1:])  # 0: the caller wants none at all
    try:
        import_module("transformers.modeling_utils")
    finally:
        gc.set_threshold(*before)
