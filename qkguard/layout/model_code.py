"""torch and the model code of transformers, imported while Python's garbage collector looks up rarely."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

RARELY = 20_000  # new objects between two looks: 700 at the start of Python 3.11


def nothing() -> None:
    """Where nothing is to be done before an import."""


def import_model_code(*further: str) -> None:
    """Import torch, what all model classes of transformers need, and further modules; what is there stays."""
    wanted = [name for name in ("transformers.modeling_utils", *further) if name not in sys.modules]
    if wanted:
        with _looking_rarely():
            for name in wanted:
                import_module(name)


@contextmanager
def _looking_rarely() -> Iterator[None]:
    """Python's garbage collector looks up rarely.

    The import makes a million objects, and nearly all of them stay: looking through them again and again for what
    could be freed takes a sixth of its time. Without any look all would be young, and gone through right after it.
    """
    before = gc.get_threshold()
    gc.set_threshold(max(RARELY, before[0]) if before[0] else 0, *before[1:])  # 0: the caller wants none at all
    try:
        yield
    finally:
        gc.set_threshold(*before)
