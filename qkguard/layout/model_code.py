"""torch and the model code of transformers, imported with less time and memory than Python takes by itself."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

RARELY = 20_000  # new objects between two looks: 700 at the start of Python 3.11
SCIPY = "scipy.optimize"


def nothing() -> None:
    """Where nothing is to be done before an import."""


def import_model_code(*further: str) -> None:
    """Import torch, what all model classes of transformers need, and further modules; what is there stays."""
    wanted = [name for name in ("transformers.modeling_utils", *further) if name not in sys.modules]
    if wanted:
        with _looking_rarely(), _scipy_later():
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


@contextmanager
def _scipy_later() -> Iterator[None]:
    """A stand-in for `scipy.optimize`, which takes a third of a second and 35 MB.

    transformers (5.6 to 5.23) imports it for one function, which the losses of its object detectors call.
    """
    if SCIPY in sys.modules:
        yield
        return
    sys.modules[SCIPY] = stand_in = _StandIn(SCIPY)
    try:
        yield
    finally:
        if sys.modules.get(SCIPY) is stand_in:
            del sys.modules[SCIPY]


class _StandIn(ModuleType):
    """A module with one function, which imports the real one when it is called; whatever else is asked of it, too."""

    @staticmethod
    def linear_sum_assignment(*args: Any, **options: Any) -> Any:
        return import_module(SCIPY).linear_sum_assignment(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks of any module
            raise AttributeError(name)
        if sys.modules.get(SCIPY) is self:
            del sys.modules[SCIPY]
        return getattr(import_module(SCIPY), name)
