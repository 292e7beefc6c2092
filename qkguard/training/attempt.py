"""Work beside the training that may fail without ending it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from qkguard.distributed import ranks
from qkguard.errors import QKGuardError, RankLostError, WrongReferenceError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def attempt(what: str, work: Callable[[], T], *, strict: bool, advice: str) -> T | None:
    """The result of `work`, or None where it failed and training goes on; rank 0 logs the failure and `advice`.

    Raises:
        Exception: what `work` raised, if `strict`; a wrong reference and a lost rank always.
    """
    try:
        return work()
    except Exception as error:
        if strict or isinstance(error, WrongReferenceError | RankLostError):
            raise
        if ranks.rank() == 0:
            reason = error if isinstance(error, QKGuardError) else f"{type(error).__name__}: {error}"
            logger.error("%s failed: %s. Training goes on; %s; strict=True stops instead", what, reason, advice)
        return None
