"""The keys that TRL takes, read from the source of its classes: to import them takes seconds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

CLASSES = ("SFTConfig", "ModelConfig")
FILES = {
    "trl": ("trainer/sft_config.py", "trainer/base_config.py", "trainer/model_config.py"),
    "transformers": ("training_args.py",),
}
"""Where those classes and all that they inherit from stand."""


@cache
def trl_keys() -> frozenset[str] | None:
    """The fields of SFTConfig and ModelConfig, inherited ones included.

    None where the sources of this version are arranged in another way: then TRL alone can tell what it takes.
    """
    known = {found.name: found for file in _files() for found in _classes(file)}
    keys: set[str] = set()
    wanted = list(CLASSES)
    while wanted:
        found = known.get(wanted.pop())
        if found is None:
            return None
        for statement in found.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                if "aliases" in ast.dump(statement):  # further names on the command line, which no key resembles
                    return None
                keys.add(statement.target.id)
        wanted += [base.id if isinstance(base, ast.Name) else "" for base in found.bases]
    return frozenset(keys)


def _files() -> Iterator[Path]:
    for package, names in FILES.items():
        spec = find_spec(package)  # of a package at the root this imports nothing
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from (Path(folder) / name for name in names)


def _classes(file: Path) -> list[ast.ClassDef]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError):
        return []
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]
