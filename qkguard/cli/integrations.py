"""`qkguard integrations`: what to add in which training framework, and the file that one loads."""

from __future__ import annotations

from typing import Annotated

import typer

from qkguard.cli import options as opt
from qkguard.cli.output import print_json, print_table, say


def integrations(
    name: Annotated[
        str | None,
        typer.Argument(help="A framework: print the file that it loads, or what to add, and nothing else."),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """List frameworks that take the guard, or print what one needs.

    \b
    Example:
      swift sft ... --external_plugins $(qkguard integrations ms-swift) --callbacks qkguard
    """
    from qkguard.integrations.frameworks import FRAMEWORKS, find_framework

    if name is not None:
        found = find_framework(name)
        if as_json:
            print_json(found.to_json())
        else:
            print(found.file or found.add)
        return
    if as_json:
        print_json({"integrations": [framework.to_json() for framework in FRAMEWORKS]})
        return
    print_table(["framework", "<what to add"], [(f.name, f.add) for f in FRAMEWORKS])
    say("\nSettings, and what was tested: docs/frameworks.md")
