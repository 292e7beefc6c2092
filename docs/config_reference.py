"""Writes docs/CONFIG.md: every setting of `QKGuardConfig`, and every key that recipes have beside it.

python docs/config_reference.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).parents[1]))

from qkguard import QKGuardConfig
from qkguard.sft.data import DataArguments
from qkguard.training.checked import helps

BREAK = "<br>"  # a line of its own within a cell
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


def table(kind: Any) -> str:
    """A table of a checked dataclass's fields: name, type, default, help."""
    hints, notes = get_type_hints(kind), helps(kind)
    rows = ["| key | what it takes and does |", "|---|---|"]
    for name, field in kind.__pydantic_fields__.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        takes = f"{shown(hints[name])}; default `{default!r}`"
        cells = (f"`{name}`", f"{takes}{BREAK}{notes[name].replace('<', '&lt;')}")
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "\\n") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def shown(hint: Any) -> str:
    """A type in pieces that a table can wrap: `int` or `None`; `"save"`, `"best"`."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(shown(member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in get_args(hint))
    if isinstance(hint, type) and not get_args(hint):
        return f"`{hint.__name__}`".replace("NoneType", "None")
    return f"`{hint}`".replace("typing.", "")


def document() -> str:
    return INTRO + table(QKGuardConfig) + DATA + table(DataArguments)


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
