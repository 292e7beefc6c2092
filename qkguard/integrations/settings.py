"""The guard's settings as frameworks hand them over: a section of their YAML, or an environment variable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qkguard.errors import QKGuardError

VARIABLE = "QKGUARD_SETTINGS"
"""Holds settings where a framework has no place for them: the path of a YAML file, or YAML itself."""


def checked(section: Any, where: str = "qkguard:") -> dict[str, Any]:
    """Settings as keyword arguments of `QKGuardCallback`, checked by QKGuardConfig itself; none for an empty section.

    Raises:
        QKGuardError: no mapping, an unknown setting or a wrong value, in one sentence that says `where`.
    """
    from qkguard.training.config import QKGuardConfig

    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise QKGuardError(f"{where} {section!r} is no section of settings; expected lines of `key: value`.")
    settings = {str(key): _plain(value) for key, value in section.items()}
    try:
        QKGuardConfig(**settings)
    except QKGuardError as error:
        raise QKGuardError(f"{where} {error}") from None
    return settings


def from_environment() -> dict[str, Any]:
    """Settings from `QKGUARD_SETTINGS`; none where it is not set.

    QKGUARD_SETTINGS=guard.yaml or QKGUARD_SETTINGS='{restore_on: end, probe_lengths: [1024, 4096]}'

    Raises:
        QKGuardError: a file that cannot be read, no YAML, or wrong settings.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text.endswith((".yaml", ".yml", ".json")):
        try:
            text = Path(text).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise QKGuardError(f"{VARIABLE}: {text} cannot be read ({error.strerror}).") from None
    try:
        section = yaml.safe_load(text)
    except yaml.YAMLError:
        raise QKGuardError(
            f"{VARIABLE}: {text!r} is not valid YAML; expected a file or {{key: value, ...}}."
        ) from None
    return checked(section, f"{VARIABLE}:")


def _plain(value: Any) -> Any:
    """A framework's own kind of mapping (axolotl's answers every key) as a dict."""
    return {key: _plain(held) for key, held in value.items()} if isinstance(value, Mapping) else value
