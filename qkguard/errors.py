"""What users are told: refusals in one readable line, and settings under their old names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


class QKGuardError(Exception):
    """A refusal or a failed check, in one readable line: what was found, what was expected, what to do next.

    The CLI prints it without a traceback and exits with code 2. Inside training it stops the run on all ranks
    where the reference is wrong, and is logged where only a probe, tracker or restored write failed.
    """


class UnknownLayoutError(QKGuardError):
    """Where queries and keys sit in a model could not be established for certain."""


class RearrangedError(QKGuardError):
    """transformers cuts or joins tensors while loading, so that parameters have no tensor of their own on disk."""


class WrongReferenceError(QKGuardError):
    """The pre-SFT reference is missing, damaged or another run's: never continued on."""


class RankLostError(QKGuardError):
    """Another rank gave no sign of life: nothing that needs all ranks can go on."""


RENAMED = {"parts": "projections", "strengths": "per_layer", "entangled": "shared"}
"""Settings by their names in 0.1; they work until 0.3."""

DROPPED = {
    "gram": "qk-pro has one reading now, the Gram matrix of each key head",
    "allow_pickle": "pickled checkpoints are not read; save them as safetensors with save_pretrained",
}
"""Settings of 0.1 that mean nothing any more."""


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their present names; each old one is told of in one warning line.

    Raises:
        QKGuardError: a setting given under its old and its new name.
    """
    out = dict(settings)
    for old in [name for name in out if name in RENAMED]:
        new = RENAMED[old]
        if new in out:
            raise QKGuardError(f"{old} and {new} are the same setting; give {new} alone.")
        logger.warning("The setting %s is called %s now; the old name works until version 0.3.", old, new)
        out[new] = out.pop(old)
    for old in [name for name in out if name in DROPPED]:
        logger.warning("The setting %s has no effect any more: %s.", old, DROPPED[old])
        del out[old]
    return out


def first_line(error: BaseException) -> str:
    """Another library's exception in one line: its type and the first line of its text, cut at 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
