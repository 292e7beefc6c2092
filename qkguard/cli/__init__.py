"""The command line, `qkguard ...`: one thin module per command.

May import every other room. Public: `main`.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

import typer

from qkguard.cli import (
    demo,
    diagnose,
    drift,
    inspect,
    integrations,
    merge,
    probe,
    recipes,
    report,
    restore,
    sft,
    sweep,
    verify,
)
from qkguard.cli.options import current_flags
from qkguard.errors import QKGuardError

app = typer.Typer(
    name="qkguard",
    help="Keep long-range recall through chain-of-thought SFT: track how far queries and keys drift, and write "
    "checkpoints in which they are as before.",
    no_args_is_help=True,
    rich_markup_mode=None,  # its boxes are twice as long, and unreadable at 80 columns
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("demo")(demo.demo)
app.command("sft", context_settings=sft.PASSED_ON)(sft.sft)
app.add_typer(recipes.app, name="recipes")
app.command("integrations")(integrations.integrations)
app.command("report")(report.report)

app.command("diagnose")(diagnose.diagnose)
app.command("inspect")(inspect.inspect)
app.command("restore")(restore.restore)
app.command("merge")(merge.merge)
app.command("drift")(drift.drift)
app.command("verify")(verify.verify)
app.command("probe")(probe.probe)
app.command("sweep")(sweep.sweep)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    # No docstring: typer would show it in the place of the application's help
    if version:
        from qkguard import __version__

        print(f"qkguard {__version__}")
        raise typer.Exit()


def main() -> None:
    """Run the command line. Exit codes: 0 done and whole, 2 bad input (one line on stderr), 130 interrupted."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # as ctrl-C: what is half-written is removed on the way out
        signal.signal(number, _interrupt)
    try:
        code = app(current_flags(sys.argv[1:]), standalone_mode=False)
    except QKGuardError as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # `qkguard ... | head`
        sys.stderr.close()
        code = 0
    except OSError as error:
        code = _fail(f"{error.strerror or error} ({error.filename})" if error.filename else str(error))
    except Exception as error:
        # Usage errors have no public base class that is the same in all supported versions of typer.
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # `qkguard` alone: its message is the whole help
            print(error.format_message(), file=sys.stderr)
            code = 2
        else:
            command = getattr(getattr(error, "ctx", None), "command_path", "qkguard")
            code = _fail(f"{error.format_message()} (see {command} --help)")
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(message: str) -> int:
    """One line on stderr, and the exit code for bad input."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
