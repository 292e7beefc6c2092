"""The restore methods by name, their options, and what is a valid combination of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from typing import Any

from qkguard.errors import QKGuardError
from qkguard.layout.selection import Selection, show_layers
from qkguard.restore.plain import Restored

DEFAULTS: dict[str, Any] = {"ridge": 10.0, "alpha": 1.0, "align": False, "per_layer": None}
"""Options of all methods; one given another value with a method that does not read it is an error.

A ridge of 10 keeps more of the skill than 1 on most bases of `recipes/amnesia-lab`, at a little less recall.
"""


@dataclass(frozen=True)
class Method:
    """A restore method.

    Attributes:
        name: what users call it.
        home: the module of this room with the method itself (see `qkguard.restore`), and the function's name there.
        options: the options it reads, of DEFAULTS.
        strength: the one of them that `per_layer` may set for each layer.
        couples: it treats queries and keys together, so both must be restored.
        rotates: it rotates queries and keys, which the gains of q/k norms may forbid.
        computes: it does arithmetic in torch; one that does not takes numpy arrays or tensors and moves them as they
            are.
    """

    name: str
    home: str
    options: tuple[str, ...] = ()
    strength: str | None = None
    couples: bool = False
    rotates: bool = False
    computes: bool = True

    @property
    def function(self) -> Callable[..., Restored]:
        """The method, imported when it is needed: those that compute bring torch."""
        module, name = self.home.split(".")
        found: Callable[..., Restored] = getattr(import_module(f"qkguard.restore.{module}"), name)
        return found

    def needs_both(self, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, queries and keys must both be restored."""
        return self.couples or bool(options.get("align"))

    def needs_gains(self, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, it asks for the gains of q/k norms that are not restored."""
        return self.rotates or bool(options.get("align"))


METHODS = {
    "restore": Method("restore", "plain.restore", computes=False),
    "qk-pro": Method("qk-pro", "qk_pro.qk_pro", ("ridge", "per_layer"), strength="ridge", couples=True),
    "procrustes": Method("procrustes", "procrustes.procrustes", couples=True, rotates=True),
    "interpolate": Method("interpolate", "interpolate.interpolate", ("alpha", "align", "per_layer"), strength="alpha"),
}


def get_method(name: str) -> Method:
    """The method of that name; QKGuardError with the names there are otherwise."""
    if name not in METHODS:
        raise QKGuardError(f"Unknown restore method {name!r}; expected one of: {', '.join(METHODS)}")
    return METHODS[name]


def check_options(name: str, options: Mapping[str, Any], projections: Sequence[str] = ("q", "k")) -> dict[str, Any]:
    """The options that a method reads, converted, with defaults filled in.

    Args:
        name: the method.
        options: values by the names of DEFAULTS; other keys are ignored, None stands for the default.
        projections: what is restored, some of "q" and "k".

    Raises:
        QKGuardError: an option out of range or without effect here, or a method that needs queries and keys alike.
    """
    method = get_method(name)
    given = {key: default if options.get(key) is None else options[key] for key, default in DEFAULTS.items()}
    for key, value in given.items():
        if key not in method.options and value != DEFAULTS[key]:
            readers = " or ".join(other.name for other in METHODS.values() if key in other.options)
            raise QKGuardError(
                f"{key}={value!r} has no effect with method {name!r}; leave it out, or use method {readers}"
            )
    chosen = {key: given[key] for key in method.options}
    if method.strength:
        chosen[method.strength] = _strength(method.strength, chosen[method.strength])
        if chosen["per_layer"] is not None:
            chosen["per_layer"] = _per_layer(method.strength, chosen["per_layer"])
    if method.needs_both(chosen) and set(projections) != {"q", "k"}:
        what = f"{name} with align" if chosen.get("align") else name
        raise QKGuardError(
            f"{what} treats queries and keys together, but projections has only {', '.join(projections)}; use both, "
            "or method restore or interpolate (without align)"
        )
    return chosen


def check_per_layer(options: Mapping[str, Any], selection: Selection) -> None:
    """Refuse values for layers that are not selected."""
    layers = [spec.layer for spec, _ in selection]
    unknown = sorted(set(options.get("per_layer") or {}) - set(layers))
    if unknown:
        known = show_layers(layers)
        raise QKGuardError(
            f"The setting per_layer names layers {unknown}, which are not restored; those that are: {known}"
        )


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
        raise QKGuardError(f"Invalid alpha={value!r}: expected a number from 0 (tuned) to 1 (before SFT).")
    if key == "ridge" and not (number >= 0 and isfinite(number)):
        raise QKGuardError(f"Invalid ridge={value!r}: expected a number >= 0.")
    return number


def _per_layer(key: str, value: Any) -> dict[int, float]:
    """Layer -> strength; keys may be text, as in JSON."""
    try:
        pairs = {int(layer): strength for layer, strength in dict(value).items()}
    except (TypeError, ValueError):
        raise QKGuardError(
            f"Invalid per_layer={value!r}: expected one {key} for each of some layers, such as {{3: 0.5, 7: 1}}."
        ) from None
    return {layer: _strength(key, strength) for layer, strength in sorted(pairs.items())}
