"""The guard in ms-swift: registers the callback `qkguard`.

    swift sft ... --external_plugins $(qkguard integrations ms-swift) --callbacks qkguard

Settings come from the environment variable QKGUARD_SETTINGS, a YAML file or YAML itself: ms-swift's arguments have no
place for them.
"""

from __future__ import annotations

from typing import Any

from qkguard.integrations.frameworks import needed
from qkguard.integrations.settings import from_environment
from qkguard.training.callback import QKGuardCallback

with needed("swift", "ms-swift"):
    from swift.callbacks import callbacks_map

SETTINGS = from_environment()  # here, so that a wrong one ends the run before a model is loaded


def make_guard(args: Any, trainer: Any) -> QKGuardCallback:
    """What ms-swift calls for each name in `--callbacks`, with its training arguments and its trainer."""
    return QKGuardCallback(**SETTINGS)


callbacks_map["qkguard"] = make_guard
