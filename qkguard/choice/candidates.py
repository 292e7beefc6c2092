"""What a sweep measures: candidates, each a choice of tensors that come from before SFT, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from qkguard.errors import QKGuardError, current_names
from qkguard.layout.rows import RETRIEVAL
from qkguard.restore.registry import check_options, get_method

USUAL: dict[str, list[dict[str, Any]]] = {
    "restore": [{}],
    "qk-pro": [{"ridge": ridge} for ridge in (1.0, 10.0)],
    "interpolate": [{"alpha": alpha} for alpha in (0.25, 0.5, 0.75)] + [{"alpha": 0.5, "align": True}],
    "procrustes": [{}],
}
"""What a method stands for in a grid where no options are given."""

GRID = ("restore", "restore:layers=retrieval", "restore:projections=k", "qk-pro", "interpolate")
"""The default grid: 9 candidates. Procrustes attends as restore does: it shows only as alignment of interpolate."""

CONTROLS: dict[str, tuple[str, ...]] = {"q": ("q",), "k": ("k",), "v": ("v",), "o": ("o",), "vo": ("v", "o")}
"""The experiment's controls: single projections taken back whole."""


FINAL: tuple[tuple[str, dict[str, Any]], ...] = (("restore", {}), ("qk-pro", {}), ("interpolate", {"alpha": 0.5}))
"""What is measured beside raw when a training ends."""


@dataclass(frozen=True)
class Candidate:
    """One model to measure.

    `kind` is "base", "raw", "method", "control" or "layer". `tensors` are the projections that change, of q, k, v, o;
    `layers` the decoder layers, None for all that are selected, "retrieval" for those that a measurement of the base
    will name.
    """

    name: str
    kind: str
    tensors: tuple[str, ...] = ()
    method: str = "restore"
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | Literal["retrieval"] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it treats queries and keys, in all layers that are selected."""
        return len(self.tensors) == 2 and self.layers is None

    @property
    def recommendable(self) -> bool:
        """Whether it is a restored checkpoint that `restore_checkpoint` can write."""
        return self.kind == "method"


def method_candidates(methods: Sequence[str] | str | None = None) -> list[Candidate]:
    """The candidates of a grid.

    Args:
        methods: entries `name` (that method's usual options) or `name:key=value:...`, several values of a key
            separated by slashes: "qk-pro:ridge=0.3/1/3", "interpolate:alpha=0.5:align", "restore:projections=k",
            "restore:layers=retrieval".

    Raises:
        QKGuardError: an entry that is not written so, or options that its method does not take.
    """
    if methods is None:
        methods = GRID
    entries = methods.replace(",", " ").split() if isinstance(methods, str) else list(methods)
    found: dict[str, Candidate] = {}
    for entry in entries:
        name, *settings = entry.split(":")
        get_method(name)
        for options in _combinations(entry, settings) if settings else USUAL[name]:
            candidate = method_candidate(name, options)
            found[candidate.name] = candidate
    if not found:
        raise QKGuardError("The grid is empty. Name methods: restore,qk-pro:ridge=0.3/1,interpolate:alpha=0.5.")
    return list(found.values())


def final_candidates(own: Candidate, without: Sequence[str] = ()) -> list[Candidate]:
    """What is measured when a training ends, beside raw: the usual three, and the run's `own` where it is another.

    Those in `without`, and those that need other projections than the run restores, are left out.
    """
    found = []
    for name, options in FINAL:
        if name not in without and (len(own.tensors) == 2 or not get_method(name).couples):
            found.append(method_candidate(name, {**options, "projections": own.tensors}))
    return found if own in found else [*found, own]


def control_candidates(controls: Iterable[str] | str) -> list[Candidate]:
    """The controls asked for: some of q, k, v, o, vo, or "all"."""
    asked = controls.replace(",", " ").split() if isinstance(controls, str) else list(controls)
    if asked == ["all"]:
        asked = list(CONTROLS)
    for name in asked:
        if name not in CONTROLS:
            raise QKGuardError(f"Unknown control {name!r}: expected some of {', '.join(CONTROLS)}, or all.")
    return [Candidate(f"{'+'.join(CONTROLS[name]).upper()} only", "control", CONTROLS[name]) for name in asked]


def layer_candidates(layers: Iterable[int | None]) -> list[Candidate]:
    """`restore` of one layer at a time."""
    return [Candidate(f"layer {n}", "layer", ("q", "k"), layers=(n,)) for n in layers if n is not None]


def method_candidate(method: str, options: Mapping[str, Any]) -> Candidate:
    """One method with its options, `projections` and `layers` among them; options that are None are the defaults."""
    options = dict(options)
    projections = tuple(sorted(set(options.pop("projections", ("q", "k"))), reverse=True))
    layers = options.pop("layers", None)
    chosen = check_options(method, options, projections)
    said = [f"{key} {value:g}" for key, value in chosen.items() if key in ("ridge", "alpha")]
    said += ["aligned"] if chosen.get("align") else []
    said += ["by layer"] if chosen.get("per_layer") else []
    said += ["" if len(projections) == 2 else f"{projections[0].upper()} only"]
    said += ["in retrieval layers"] if layers == RETRIEVAL else []
    chosen = {key: value for key, value in chosen.items() if value is not None}
    return Candidate(" ".join([method, *filter(None, said)]), "method", projections, method, chosen, layers)


def _combinations(entry: str, settings: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of the values that an entry's settings (`key=value/value`, or `key` for true) list."""
    choices: dict[str, list[Any]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        values = text.split("/") if equals else ["true"]
        for name, texts in current_names({key: values}).items():  # one, or none where it means nothing any more
            try:
                choices[name] = [_value(name, text) for text in texts]
            except (ValueError, KeyError):
                raise QKGuardError(
                    f"Invalid {setting!r} in {entry!r}: expected ridge=, alpha=, align, projections= or "
                    "layers=retrieval, with several values separated by slashes."
                ) from None
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def _value(key: str, text: str) -> Any:
    if key == "projections":
        if not text or set(text) - {"q", "k"}:
            raise ValueError
        return tuple(text)
    if key == "layers":
        return {str(RETRIEVAL): RETRIEVAL}[text]
    if key == "align":
        return {"true": True, "false": False}[text]
    return {"ridge": float, "alpha": float}[key](text)
