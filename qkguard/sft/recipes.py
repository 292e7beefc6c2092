"""Where the bundled recipes are: inside an installed package, else at the top of the repository."""

from __future__ import annotations

import difflib
from pathlib import Path

from qkguard.errors import QKGuardError

PACKAGE = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """The folder of the recipes: `qkguard/recipes` of a wheel, `recipes` of a clone.

    Raises:
        QKGuardError: neither is there.
    """
    for folder in (PACKAGE / "recipes", PACKAGE.parent / "recipes"):
        if (folder / "accelerate_configs").is_dir():
            return folder
    raise QKGuardError(f"No recipes beside {PACKAGE}; install qkguard again")


def recipe_names() -> dict[str, Path]:
    """Name -> file of every bundled recipe, such as `qwen3/cot-sft/full`."""
    folder = recipes_folder()
    files = [f for f in sorted(folder.rglob("*.yaml")) if f.parent.name != "accelerate_configs"]
    return {f.relative_to(folder).with_suffix("").as_posix(): f for f in files}


def find_recipe(name: str) -> Path:
    """A recipe by path or bundled name.

    Raises:
        QKGuardError: there is none, with the nearest name.
    """
    if Path(name).is_file():
        return Path(name)
    names = recipe_names()
    wanted = name.removesuffix(".yaml").removeprefix("recipes/")
    if wanted in names:
        return names[wanted]
    near = difflib.get_close_matches(wanted, names, 1, 0.4)
    hint = f"; did you mean {near[0]}?" if near else ";"
    raise QKGuardError(f"{name} is neither a file nor a bundled recipe{hint} `qkguard recipes` lists them")


def headline(recipe: Path) -> str:
    """The first comment line of a recipe: what it trains, on what."""
    first = recipe.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ").strip()
