"""Hub ids with a revision, `org/model@v1.0`: a branch, a tag or a commit."""

from __future__ import annotations

import os

from qkguard.errors import QKGuardError


def split_revision(name: str) -> tuple[str, str | None]:
    """ "org/model@v1.0" -> ("org/model", "v1.0"); without one, and for whatever exists here under that name, None.

    Raises:
        QKGuardError: nothing after the "@", or nothing on the hub could have this name: it is a folder here.
    """
    if os.path.exists(os.path.expanduser(name)):
        return name, None
    model, at, revision = name.rpartition("@")
    if not at:
        return name, None
    if not revision:
        raise QKGuardError(f"{name} names no revision after the @: expected a branch, a tag or a commit.")
    if os.path.exists(os.path.expanduser(model)):
        raise QKGuardError(f"{model} is a folder here, which has no revisions. Leave @{revision} out.")
    return model, revision
