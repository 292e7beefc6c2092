"""skills/qkguard/SKILL.md names commands, options, settings and files that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer

from qkguard import QKGuardConfig
from qkguard.cli import app

SKILL = Path(__file__).parents[2] / "skills" / "qkguard" / "SKILL.md"
TEXT = SKILL.read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def complaints(text: str) -> list[str]:
    """Commands, options and settings that the package does not have."""
    found = []
    for line in re.findall(r"^qkguard .*|`qkguard [^`]*`", text, re.MULTILINE):
        name, *words = shlex.split(line.strip("`"))[1:]
        if name not in COMMANDS:
            found.append(name)
            continue
        known = {option for param in COMMANDS[name].params for option in param.opts}
        known |= {"--accelerate"} if name == "sft" else set()
        found += [f"{name} {word}" for word in words if word.startswith("--") and word not in known]
    for setting in re.findall(r"QKGuardCallback\(([^)]+)\)", text):
        found += [key for key in re.findall(r"(\w+)=", setting) if key not in QKGuardConfig.__dataclass_fields__]
    for setting in re.findall(r"`(\w+)=[^`]*`", text):
        if setting not in QKGuardConfig.__dataclass_fields__:
            found.append(setting)
    return found


def test_the_skill_is_true_and_found() -> None:
    front = re.match(r"---\nname: (.+)\ndescription: (.+)\n---\n", TEXT)
    assert front and front[1] == SKILL.parent.name and len(front[2]) <= 1024
    assert complaints(TEXT) == []
    assert TEXT.count("qkguard sweep") >= 2 and "callbacks=[guard]" in TEXT


def test_what_does_not_exist_is_found() -> None:
    wrong = "`qkguard heal X`, `qkguard sweep --best`, `probe_dpeth=3`, QKGuardCallback(restore_no=1)"
    assert complaints(wrong) == ["heal", "sweep --best", "restore_no", "probe_dpeth"]
