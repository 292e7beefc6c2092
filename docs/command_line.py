"""The reference of the command line as a page, made from the commands themselves (`docs/build_site.py` writes it)."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

sys.path.insert(0, str(Path(__file__).parents[1]))

import typer

from qkguard.cli import app

WORDS = {str: "TEXT", int: "NUMBER", float: "NUMBER", Path: "PATH"}
INTRO = """\
# Command line

Made from the commands. `qkguard COMMAND --help` prints the same in a terminal, and `qkguard --install-completion` sets
up completion of commands and options in bash, zsh, fish and PowerShell.

Exit codes: 0 is done, 2 is bad input or a check that failed (one line on stderr that says what to do), 1 is `sweep
--write` where the tuned checkpoint is recommended and nothing was written, 130 is interrupted. With `--json` a command
prints JSON on stdout and nothing else ([its schemas](formats.md)).
"""


def reference() -> str:
    """Markdown: every command with its usage, arguments, options and text."""
    root = typer.main.get_command(app)
    return INTRO + "".join(f"\n{section(name, command)}" for name, command in commands(root, "qkguard"))


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(full name, command) of every command below a group, groups that run by themselves included."""
    for name, command in group.commands.items():
        yield f"{path} {name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")


def section(name: str, command: Any) -> str:
    """One command: heading, usage, text, and a table of what it takes."""
    shown = [param for param in command.params if not getattr(param, "hidden", False) and param.name != "help"]
    arguments = [param for param in shown if param.param_type_name == "argument"]
    options = [param for param in shown if param.param_type_name == "option"]
    kinds = get_type_hints(inspect.unwrap(command.callback))
    required = [f"{param.opts[0]} {metavar(param, kinds)}" for param in options if param.required]
    places = [metavar(param, kinds) for param in arguments]
    usage = " ".join([name, *places, *required, "[OPTIONS]" if options else ""])
    pieces = [f"## {name}", f"```text\n{usage.strip()}\n```", body(command.help or "")]
    if shown:
        pieces.append(table([*arguments, *options], kinds))
    return "\n\n".join(pieces) + "\n"


def body(text: str) -> str:
    """A command's help as paragraphs; its examples, one command a line, as a block."""
    paragraphs = []
    for paragraph in inspect.cleandoc(text).replace("\b\n", "").split("\n\n"):
        lines = re.split(r"\n| (?=qkguard )", re.sub(r"^Examples?:\s*", "", paragraph))
        if paragraph.startswith("Example"):
            paragraph = "```bash\n" + "\n".join(line.strip() for line in lines if line.strip()) + "\n```"
        else:
            paragraph = paragraph.replace("<", "&lt;")
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def table(params: list[Any], kinds: Mapping[str, Any]) -> str:
    """Arguments and options: what to type, what it means, the default."""
    rows = ["| option | what it does | default |", "|---|---|---|"]
    for param in params:
        is_argument = param.param_type_name == "argument"
        names = [metavar(param, kinds)] if is_argument else [*param.opts, *param.secondary_opts]
        typed = ", ".join(f"`{name}`" for name in names)
        if not is_argument and not param.is_flag:
            typed += f" `{metavar(param, kinds)}`"
        rows.append("| " + " | ".join(map(escaped, (typed, param.help or "", default(param)))) + " |")
    return "\n".join(rows)


def metavar(param: Any, kinds: Mapping[str, Any]) -> str:
    """The word that stands for a value: the option's own, or one for the type of the command's parameter."""
    if param.metavar or param.param_type_name == "argument":
        return str(param.metavar or param.name.upper())
    hint = kinds[param.name]
    members = [member for member in get_args(hint) if member is not type(None)]
    return WORDS[members[0] if members else hint]


def default(param: Any) -> str:
    """What holds where nothing is typed."""
    if isinstance(param.show_default, str):
        return param.show_default
    if param.required:
        return "required"
    value = param.default() if callable(param.default) else param.default
    if value is None or value == "" or value is False or param.show_default is False:
        return ""
    return "on" if value is True else f"`{value}`"


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(reference())
