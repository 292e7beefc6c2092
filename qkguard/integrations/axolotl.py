"""The guard in axolotl: a plugin, and its section of the YAML.

plugins:
  - qkguard.integrations.axolotl.QKGuardPlugin
qkguard:
  restore_on: end
  probe_lengths: [1024, 4096]
"""

from __future__ import annotations

import logging
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, TypeAdapter, WithJsonSchema

import qkguard.training.adapter_weights  # noqa: F401 - so that its logger is there
from qkguard.errors import QKGuardError
from qkguard.integrations.frameworks import needed
from qkguard.integrations.settings import checked
from qkguard.training.callback import QKGuardCallback, show_log_lines
from qkguard.training.config import QKGuardConfig

with needed("axolotl", "axolotl"):
    from axolotl.integrations.base import BasePlugin


def _section(given: Any) -> dict[str, Any]:
    try:
        return checked(given)
    except QKGuardError as error:
        raise ValueError(str(error)) from None  # pydantic collects these, and axolotl prints them


# The section stays the dict that the user wrote: axolotl hands its config on without what is None, and an explicit
# null (probe_budget) would be lost in a model of its own. Check and schema are QKGuardConfig's.
Section = Annotated[
    dict[str, Any],
    BeforeValidator(_section),
    WithJsonSchema(TypeAdapter(QKGuardConfig).json_schema()),
]


class QKGuardArgs(BaseModel):
    """What the plugin adds to axolotl's config: the section `qkguard`, whose keys are the fields of QKGuardConfig."""

    qkguard: Section | None = None


def _show_lines() -> None:
    """Show the guard's lines: axolotl's loggers and handlers (0.21) let pass only the warnings of other packages."""
    for name, found in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == "qkguard" and isinstance(found, logging.Logger):
            found.filters[:] = [one for one in found.filters if not type(one).__module__.startswith("axolotl")]
    show_log_lines(whatever_root_shows=True)


class QKGuardPlugin(BasePlugin):
    """Adds the guard to the trainer that axolotl builds."""

    def get_input_args(self) -> str:
        """The pydantic model that axolotl checks the config with."""
        return f"{__name__}.{QKGuardArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[QKGuardCallback]:
        """A guard for every trainer."""
        _show_lines()
        return [QKGuardCallback(**checked(cfg.get("qkguard")))]
