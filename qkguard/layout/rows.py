"""Which rows are restored: one description that travels from the settings to the files. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict, get_args

from qkguard.errors import QKGuardError, current_names

Shared = Literal["keep", "restore", "refuse"]

RETRIEVAL: Literal["retrieval"] = "retrieval"
"""In the place of layer numbers: the layers with heads that look up the needle before SFT (`probe.retrieval`)."""


class RowOptions(TypedDict, total=False):
    """The fields of `RowSelection` as keyword arguments."""

    projections: Sequence[str]
    layers: Sequence[int] | Literal["retrieval"] | None
    include_norms: bool
    include_sliding_window: bool
    shared: Shared


@dataclass(frozen=True)
class RowSelection:
    """The query and key rows to restore.

    Attributes:
        projections: some of "q" and "k"; rows that feed both need both.
        layers: decoder layers, counted from 0; None is every softmax-attention layer.
        include_norms: also the gains of q/k normalisation (the paper restores W_Q and W_K alone).
        include_sliding_window: sliding-window and chunked layers count as softmax attention.
        shared: what happens to rows that feed keys and values alike (MLA's latent): "keep" leaves them tuned,
            "restore" takes the values back with them, "refuse" stops.

    Raises:
        QKGuardError: a value outside its choices.
    """

    projections: tuple[str, ...] = ("q", "k")
    layers: tuple[int, ...] | None = None
    include_norms: bool = False
    include_sliding_window: bool = True
    shared: Shared = "keep"

    def __post_init__(self) -> None:
        if not self.projections or set(self.projections) - {"q", "k"}:
            raise QKGuardError(f"Invalid projections={list(self.projections)!r}: expected q, k or both.")
        if isinstance(self.layers, str):
            raise QKGuardError(_not_numbers(self.layers))
        if self.layers is not None and not self.layers:
            raise QKGuardError(
                "Invalid layers=[]: it restores nothing. Leave it out for every softmax layer, or name some."
            )
        if self.shared not in get_args(Shared):
            raise QKGuardError(f"Invalid shared={self.shared!r}: expected {', '.join(get_args(Shared))}.")

    @classmethod
    def of(cls, options: RowOptions | dict[str, Any]) -> RowSelection:
        """The selection from keyword arguments, old names included.

        Raises:
            QKGuardError: an argument that is not known.
        """
        given: dict[str, Any] = current_names(options)
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise QKGuardError(f"Unknown argument {unknown[0]!r}: the rows to restore are chosen by {known}.")
        for name in ("projections", "layers"):
            if given.get(name) is not None and not isinstance(given[name], str):
                given[name] = tuple(given[name])
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _not_numbers(layers: str) -> str:
    if layers != RETRIEVAL:
        return f'Invalid layers={layers!r}: expected layer numbers, or "{RETRIEVAL}" where they are measured.'
    return (
        f'layers="{RETRIEVAL}" needs a measurement of the model before SFT, and there is none here. Use the guard, '
        f"`qkguard sweep --methods restore:layers={RETRIEVAL}`, or `qkguard restore` on a checkpoint of a guarded run "
        "that was set so."
    )
