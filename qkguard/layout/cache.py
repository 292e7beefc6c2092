"""What discovery found for a config, kept for the next command: importing a model's code takes longer than a restore.

One small JSON file per question in `$QKGUARD_CACHE`, else `$XDG_CACHE_HOME/qkguard` or `~/.cache/qkguard`;
`QKGUARD_CACHE=""` keeps nothing. The key covers everything an answer depends on: the question's inputs, the versions
of transformers and torch, and the text of this package. Anything unreadable is simply asked again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def cached(question: str, inputs: Any, find: Callable[[], T]) -> T:
    """`find()`, or what it returned when the same question was asked before.

    Args:
        question: what is asked, for instance "attention".
        inputs: JSON values that, with the code, settle the answer.
        find: gives the answer as JSON values; what it raises is never kept.
    """
    file = _file(question, inputs)
    if file is None:
        return find()
    known: T | None = _read(file)
    if known is not None:
        return known
    answer = find()
    _keep(file, {"answer": answer})
    return answer


def _file(question: str, inputs: Any) -> Path | None:
    """Where the answer to a question is kept; None where nothing is."""
    folder = _folder()
    if folder is None:
        return None
    asked = json.dumps([question, inputs, _code()], sort_keys=True, default=str)
    return folder / f"{question}-{sha256(asked.encode()).hexdigest()[:32]}.json"


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folder() -> Path | None:
    named = os.environ.get("QKGUARD_CACHE")
    if named is not None:
        return Path(named) if named else None
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "qkguard"
    except RuntimeError:  # no home directory
        return None


@cache
def _code() -> str:
    """One hash of the code that answers: the libraries' versions and this package's own text."""
    digest = sha256(f"{version('transformers')} {version('torch')}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _keep(file: Path, entry: Any) -> None:
    """Complete or not at all; a full or read-only disk is no reason to fail."""
    part = file.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps(entry), encoding="utf-8")
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
