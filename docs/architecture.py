"""Writes the picture of the rooms in CONTRIBUTING.md: the import contract's layers, each room in its own words.

python docs/architecture.py
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
START, END = "<!-- rooms: python docs/architecture.py -->", "<!-- end -->"


def layers() -> list[list[str]]:
    """The rooms from top to bottom; those that may not import each other share a layer."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = config["tool"]["importlinter"]["contracts"]
    return [re.split(r"\s*\|\s*", layer) for layer in contract["layers"]]


def docstring(room: str) -> str:
    """What a room, a folder or a single file, says of itself."""
    folder = ROOT / "qkguard" / room
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def picture() -> str:
    """One line per room, a rule between layers."""
    rows = [[(room, docstring(room).split("\n")[0]) for room in layer] for layer in layers()]
    left = max(len(room) for row in rows for room, _ in row)
    right = max(len(text) for row in rows for _, text in row)
    lines = ["```text", f"┌─{'─' * left}─┬─{'─' * right}─┐"]
    for number, row in enumerate(rows):
        if number:
            lines.append(f"├─{'─' * left}─┼─{'─' * right}─┤")
        lines += [f"│ {room:<{left}} │ {text:<{right}} │" for room, text in row]
    return "\n".join([*lines, f"└─{'─' * left}─┴─{'─' * right}─┘", "```"])


def written(text: str) -> str:
    """CONTRIBUTING.md with a fresh picture."""
    before, rest = text.split(START, 1)
    return f"{before}{START}\n{picture()}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    CONTRIBUTING.write_text(written(CONTRIBUTING.read_text(encoding="utf-8")), encoding="utf-8")
