"""`qkguard integrations`: what to add in which training framework, and the file that one loads."""

from __future__ import annotations

from typing import Annotated

import typer

from qkguard.cli import options as opt
from qkguard.cli.output import print_json, print_table, say


def integrations(
    name: Annotated[
        str | None, typer.Argument(help="A framework: print the path of the file that it loads, and nothing else.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """List frameworks that take the guard, or print one's file.

    \b
    Example:
      swift sft ... --external_plugins $(qkguard integrations ms-swift) --callbacks qkguard
    """
    from qkguard.integrations.frameworks import FRAMEWORKS, plugin_file

    if name is not None:
        path = plugin_file(name)
        if as_json:
            print_json({"name": name, "file": str(path)})
        else:
            print(path)
        return
    if as_json:
        rows = [{"name": f.name, "add": f.add, "file": str(f.file) if f.file else None} for f in FRAMEWORKS]
        print_json({"integrations": rows})
        return
    print_table(["framework", "<what to add"], [(f.name, f.add) for f in FRAMEWORKS])
    say("\nSettings, and what was tested: docs/frameworks.md")
