"""Work beside the training that may fail without ending it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from qkguard.distributed import ranks
from qkguard.errors import QKGuardError, RankLostError, WrongReferenceError

logger = logging.getLogger(__name__)


@contextmanager
def attempt(what: str, *, strict: bool, advice: str) -> Iterator[None]:
    """Inside the block a failure is logged on rank 0, with `advice` (a sentence), and training continues.

        with attempt("the final export", strict=config.strict, advice="..."):
            export()

    Collectives in the block must fail on all ranks alike, as those of `ranks` do.

    Raises:
        Exception: what the block raised, if `strict`; a wrong reference and a lost rank always.
    """
    try:
        yield
    except Exception as error:
        if strict or isinstance(error, WrongReferenceError | RankLostError):
            raise
        if ranks.rank() == 0:
            reason = str(error) if isinstance(error, QKGuardError) else f"{type(error).__name__}: {error}"
            logger.error(
                "%s failed: %s. Training continues. %s Set strict=True to stop instead.",
                what[:1].upper() + what[1:],
                reason.rstrip("."),
                advice,
            )
