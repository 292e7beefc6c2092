"""Work beside the training that may fail without ending it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from qkguard.distributed import ranks
from qkguard.errors import RankLostError, WrongReferenceError, reason_of

logger = logging.getLogger(__name__)

LATER = "The raw checkpoint is safe; `qkguard restore` makes the restored model from it."
ENDS_TRAINING = (WrongReferenceError, RankLostError)
"""Failures that no setting lets training continue after."""


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
        if strict or isinstance(error, ENDS_TRAINING):
            raise
        if ranks.rank() == 0:
            say_failed(what, error, advice)


def say_failed(what: str, error: BaseException, advice: str) -> None:
    """The line that tells of a failure which training continues after."""
    logger.error(
        "%s failed: %s. Training continues. %s Set strict=True to stop instead.",
        what[:1].upper() + what[1:],
        reason_of(error).rstrip("."),
        advice,
    )
