"""`qkguard recipes`: list, show and copy the bundled recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkguard.cli import options as opt
from qkguard.cli.output import print_json, print_table, say
from qkguard.errors import QKGuardError

app = typer.Typer(
    help="The bundled recipes for `qkguard sft`.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="Name of a recipe, such as qwen3/cot-sft/full.")]


@app.callback()
def recipes(context: typer.Context, as_json: opt.Json = False) -> None:
    """List the bundled recipes, each with what it trains and on what.

    \b
    Examples:
      qkguard recipes
      qkguard recipes show qwen3/cot-sft/full
    """
    if context.invoked_subcommand:
        return
    from qkguard.sft.recipes import headline, recipe_names

    found = {name: headline(file) for name, file in recipe_names().items()}
    if as_json:
        print_json({"recipes": [{"name": n, "about": about} for n, about in found.items()]})
        return
    print_table(["recipe", "<about"], list(found.items()))
    say("\nnext: qkguard recipes show NAME, qkguard sft --config NAME --dry-run")


@app.command()
def show(name: Name) -> None:
    """Print a recipe."""
    from qkguard.sft.recipes import find_recipe

    print(find_recipe(name).read_text(encoding="utf-8"), end="")


@app.command()
def copy(
    name: Name,
    to: Annotated[Path | None, typer.Option("--to", help="File to write. Default: the name, here.")] = None,
) -> None:
    """Write a recipe to a file of your own, to edit."""
    from qkguard.sft.recipes import find_recipe

    source = find_recipe(name)
    target = to or Path(f"{name.removesuffix('.yaml').replace('/', '-')}.yaml")
    if target.exists():
        raise QKGuardError(f"{target} exists; choose another file with --to")
    opt.check_file(target)
    target.write_bytes(source.read_bytes())
    say(f"wrote {target}; next: qkguard sft --config {target} --dry-run")
