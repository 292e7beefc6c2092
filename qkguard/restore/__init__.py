"""The restore methods: pure functions from a layer's rows before and after SFT to the rows to write.

A method gets `(spec, maps, pre, post, **options)`: the layer, its selected parameters, and for each parameter name the
compact tensors before SFT (in the dtype they were kept in) and after (in the checkpoint's dtype). It returns the new
compact tensors in any float dtype, rounded once when they are written, and what it did, for the manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qkguard.errors import QKGuardError
from qkguard.restore.plain import Restored, restore


@dataclass(frozen=True)
class Method:
    """A registered method and the options (of `QKGuardConfig`) that it reads."""

    name: str
    function: Callable[..., Restored]
    options: tuple[str, ...] = ()


METHODS = {method.name: method for method in (Method("restore", restore),)}


def get_method(name: str) -> Method:
    """The method of that name; QKGuardError with the names there are otherwise."""
    if name not in METHODS:
        raise QKGuardError(f"unknown restore method {name!r}; expected one of: {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "Method", "Restored", "get_method", "restore"]
