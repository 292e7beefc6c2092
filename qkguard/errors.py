"""What users are told: refusals in one readable line, and settings under their old names."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


class QKGuardError(Exception):
    """A refusal or a failed check, in one readable line: what was found, what was expected, what to do next.

    The CLI prints it without a traceback and exits with code 2. Inside training it stops the run on all ranks
    where the reference is wrong, and is logged where only a probe, tracker or restored write failed.

    Attributes:
        complete: whether the sentence says by itself what failed and where, so that ranks add nothing to it.
    """

    complete = False


class UnknownLayoutError(QKGuardError):
    """Where queries and keys sit in a model could not be established for certain."""


class RearrangedError(QKGuardError):
    """transformers cuts or joins tensors while loading, so that parameters have no tensor of their own on disk."""


class WrongReferenceError(QKGuardError):
    """The pre-SFT reference is missing, damaged or another run's: never continued on."""


class RankLostError(QKGuardError):
    """Another rank crashed or hung: nothing that needs all ranks can continue."""


def reason_of(error: BaseException) -> str:
    """An error as a clause: a refusal's own words, else its kind and its message."""
    return str(error) if isinstance(error, QKGuardError) else f"{type(error).__name__}: {error}"


RENAMED = {"parts": "projections", "strengths": "per_layer", "entangled": "shared"}
"""Settings by their names in 0.1; they work until 0.3."""

DROPPED = {
    "gram": "qk-pro has one reading now, the Gram matrix of each key head",
    "allow_pickle": "pickled checkpoints are not read; save them as safetensors with save_pretrained",
}
"""Settings of 0.1 that have no effect any more."""


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their present names, with one warning line for each old one (of many ranks, rank 0's).

    Raises:
        QKGuardError: a setting given under its old and its new name.
    """
    out = dict(settings)
    for old in [name for name in out if name in RENAMED]:
        new = RENAMED[old]
        if new in out:
            raise QKGuardError(f"{old} and {new} are the same setting; give {new} alone.")
        _warn(f"The setting {old} is called {new} now; the old name works until version 0.3.")
        out[new] = out.pop(old)
    for old in [name for name in out if name in DROPPED]:
        _warn(f"The setting {old} has no effect any more: {DROPPED[old]}.")
        del out[old]
    return out


def first_line(error: BaseException) -> str:
    """Another library's exception in one line: its type and the first line of its text, cut at 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _warn(message: str) -> None:
    # The launcher's variable: settings are read before there is a process group to ask
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", message)
