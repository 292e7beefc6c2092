"""The restore methods by name, their options, and what is a valid combination of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from qkguard.errors import QKGuardError
from qkguard.layout.selection import Selection
from qkguard.restore.interpolate import interpolate
from qkguard.restore.plain import Restored, restore
from qkguard.restore.procrustes import procrustes
from qkguard.restore.qk_pro import qk_pro


@dataclass(frozen=True)
class Method:
    """A registered method.

    `options` are the fields of `QKGuardConfig` that it reads, `strength` the one that `per_layer` may set layer by
    layer; `joint` and `gains` whether, with given options, it treats queries and keys together and asks for the gains
    of q/k norms.
    """

    name: str
    function: Callable[..., Restored]
    options: tuple[str, ...] = ()
    strength: str | None = None
    joint: Callable[[Mapping[str, Any]], bool] = lambda options: False
    gains: Callable[[Mapping[str, Any]], bool] = lambda options: False


DEFAULTS: dict[str, Any] = {"ridge": 1.0, "alpha": 1.0, "align": False, "per_layer": None}
"""Options of all methods; one given another value with a method that does not read it is an error."""


def _aligned(options: Mapping[str, Any]) -> bool:
    return bool(options.get("align"))


METHODS = {
    method.name: method
    for method in (
        Method("restore", restore),
        Method("qk-pro", qk_pro, ("ridge", "per_layer"), "ridge", joint=lambda options: True),
        Method("procrustes", procrustes, joint=lambda options: True, gains=lambda options: True),
        Method("interpolate", interpolate, ("alpha", "align", "per_layer"), "alpha", joint=_aligned, gains=_aligned),
    )
}


def get_method(name: str) -> Method:
    """The method of that name; QKGuardError with the names there are otherwise."""
    if name not in METHODS:
        raise QKGuardError(f"unknown restore method {name!r}; expected one of: {', '.join(METHODS)}")
    return METHODS[name]


def check_options(name: str, options: Mapping[str, Any], projections: Sequence[str] = ("q", "k")) -> dict[str, Any]:
    """The options that a method reads, checked and normalised; other keys of `options` than `DEFAULTS` are ignored.

    Raises:
        QKGuardError: an unknown method, a value out of range, an option that the method does not read set to
            something else than its default, or projections that the method cannot treat alone.
    """
    method = get_method(name)
    given = {key: default if options.get(key) is None else options[key] for key, default in DEFAULTS.items()}
    for key, value in given.items():
        if key not in method.options and value != DEFAULTS[key]:
            readers = " or ".join(m.name for m in METHODS.values() if key in m.options)
            raise QKGuardError(
                f"{key}={value!r} has no effect with method {name!r}; leave it out, or use method {readers}"
            )
    chosen = {key: given[key] for key in method.options}
    for key in chosen.keys() & {"ridge", "alpha"}:
        chosen[key] = _strength(key, chosen[key])
    if chosen.get("per_layer") is not None and method.strength:
        chosen["per_layer"] = _per_layer(method.strength, chosen["per_layer"])
    if method.joint(chosen) and set(projections) != {"q", "k"}:
        what = name if name != "interpolate" else "interpolate with align"
        raise QKGuardError(
            f"{what} treats queries and keys together, projections has only {', '.join(projections)}; use both, or "
            "methods restore or interpolate (without align) for one of them"
        )
    return chosen


def check_per_layer(options: Mapping[str, Any], selection: Selection) -> None:
    """Refuse values for layers that are not selected."""
    layers = [spec.layer for spec, _ in selection]
    if unknown := sorted(set(options.get("per_layer") or {}) - set(layers)):
        known = ", ".join(str(layer) for layer in layers)
        raise QKGuardError(f"per_layer names layers {unknown}, which are not restored; those that are: {known}")


def layer_options(method: Method, options: Mapping[str, Any], layer: int | None) -> dict[str, Any]:
    """The options for one layer: a strength of its own in place of the common one."""
    mine = {key: value for key, value in options.items() if key != "per_layer"}
    own = options.get("per_layer") or {}
    if method.strength and layer in own:
        mine[method.strength] = own[layer]
    return mine


def _strength(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if key == "alpha" and not 0 <= number <= 1:
        raise QKGuardError(f"alpha={value!r} is not known; expected a share from 0 (tuned) to 1 (before SFT)")
    if key == "ridge" and not (number >= 0 and isfinite(number)):
        raise QKGuardError(f"ridge={value!r} is not known; expected a number from 0, in units of the mean eigenvalue")
    return number


def _per_layer(key: str, value: Any) -> dict[int, float]:
    """Layer -> strength; keys may be text, as in JSON."""
    try:
        pairs = {int(layer): strength for layer, strength in dict(value).items()}
    except (TypeError, ValueError):
        raise QKGuardError(
            f"per_layer={value!r} is not known; expected a strength ({key}) for each of some layers: {{3: 0.5, 7: 1}}"
        ) from None
    return {layer: _strength(key, strength) for layer, strength in sorted(pairs.items())}
