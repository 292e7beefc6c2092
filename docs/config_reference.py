"""Writes docs/CONFIG.md: every setting of `QKGuardConfig`, and every key that recipes have beside it.

python docs/config_reference.py
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, get_type_hints

sys.path.insert(0, str(Path(__file__).parents[1]))

from qkguard import QKGuardConfig
from qkguard.sft.data import DataArguments

TARGET = Path(__file__).with_name("CONFIG.md")
INTRO = """\
# Settings

Written from the help texts in the code by `python docs/config_reference.py`.

## The guard: `QKGuardConfig`

In a script they are keyword arguments, `QKGuardCallback(restore_on="end")` or `QKGuardConfig(restore_on="end")`; in a
recipe keys of the section `qkguard:`; on the command line of `qkguard sft` options, `--qkguard.restore_on end`.

"""
DATA = """
## The data of a recipe

Keys at the top of a recipe, options of `qkguard sft`. Beside them a recipe takes every field of TRL's
[SFTConfig](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig) and
[ModelConfig](https://huggingface.co/docs/trl/main/en/script_utils#trl.ModelConfig), and `env`, a mapping of
environment variables that are set where they are not set yet.

"""


def table(kind: type) -> str:
    """A table of a dataclass's fields: name, type, default, help."""
    hints = get_type_hints(kind)
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        shown = hint.__name__ if isinstance(hint, type) and not getattr(hint, "__args__", ()) else str(hint)
        cells = (f"`{field.name}`", f"`{shown.replace('typing.', '')}`", f"`{default(field)}`", field.metadata["help"])
        rows.append(
            "| "
            + " | ".join(cell.replace("|", "\\|").replace("\n", "\\n").replace("<", "&lt;") for cell in cells)
            + " |"
        )
    return "\n".join(rows) + "\n"


def default(field: dataclasses.Field[Any]) -> str:
    made = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
    return repr(made)


def document() -> str:
    return INTRO + table(QKGuardConfig) + DATA + table(DataArguments)


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
