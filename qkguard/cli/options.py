"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qkguard.cli.output import warn
from qkguard.errors import DROPPED, RENAMED, QKGuardError
from qkguard.layout.rows import RETRIEVAL, RowOptions, RowSelection

Base = Annotated[
    str, typer.Option("--base", "-b", help="Checkpoint before SFT: a folder or a hub id (NAME@REVISION).")
]
Tuned = Annotated[
    str, typer.Option("--tuned", "-t", help="Checkpoint after SFT: a folder or a hub id (NAME@REVISION).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Projections = Annotated[str, typer.Option(help="Which projections: q, k or q,k.")]
Layers = Annotated[
    str | None, typer.Option(help="Decoder layers, counted from 0: 3,7,11 or 0-15. Default: every softmax layer.")
]
Norms = Annotated[bool, typer.Option("--include-norms", help="Also the gains of q/k normalisation.")]
Sliding = Annotated[
    bool,
    typer.Option("--sliding-window/--no-sliding-window", help="Count sliding-window layers as softmax attention."),
]
Shared = Annotated[
    str,
    typer.Option(help="Rows that feed both keys and values (MLA): keep (leave them tuned), restore or refuse."),
]
Spec = Annotated[
    Path | None,
    typer.Option(
        "--spec", help="Attention layout by hand (YAML), for models whose layout cannot be found.", dir_okay=False
    ),
]
Method = Annotated[str, typer.Option(help="Restore method: restore, qk-pro, procrustes or interpolate.")]
Ridge = Annotated[
    float, typer.Option(help="qk-pro: 0 is restore; larger keeps more of the tuned queries (unit: mean eigenvalue).")
]
Alpha = Annotated[float, typer.Option(help="interpolate: from 0 (tuned) to 1 (before SFT).")]
Align = Annotated[
    bool, typer.Option("--align", help="interpolate: first rotate the base's heads towards the tuned ones.")
]
PerLayer = Annotated[
    str | None,
    typer.Option("--per-layer", help="Ridge or alpha of single layers, such as 3=0.5,7=1.", metavar="LAYER=VALUE,..."),
]
HAYSTACK_PER = ("sample", "length")
MODES = ("auto", "chat", "plain")
DTYPES = ("auto", "float32", "bfloat16", "float16")

RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow importing the checkpoint's own model code.")
]
Depths = Annotated[str, typer.Option(help="How many needle depths, or a list such as 0,0.5,1.")]
Samples = Annotated[int, typer.Option(min=1, help="Probe samples for every task, length and depth.")]
Tasks = Annotated[str, typer.Option(help="RULER tasks: single_1-3 (or S1-S3), multikey_1-3, multivalue, multiquery.")]
Haystack = Annotated[
    str | None, typer.Option(help="Text for the haystacks: .txt, .md, .json or .jsonl. Default: generated.")
]
HaystackPer = Annotated[
    str,
    typer.Option(
        help="Each sample has a haystack of its own, or all of one task and length share one (length), which is read "
        "once: faster, but samples are less independent."
    ),
]
Mode = Annotated[str, typer.Option(help="auto, chat or plain prompts; auto uses a chat template where there is one.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help='"auto" (all accelerators), cpu, cuda:1, ...')]
BatchTokens = Annotated[
    int, typer.Option(min=1, help="Most tokens in one forward pass of the probe, where several samples fit.")
]
Chunk = Annotated[
    int | None,
    typer.Option(
        help="Read contexts in chunks of so many tokens; 0 is never. Default: above 32K tokens.", show_default=False
    ),
]


def row_selection(
    layers: str | None,
    norms: bool,
    sliding_window: bool,
    shared: str,
    projections: str | None = None,
    *,
    retrieval: bool = False,
) -> RowOptions:
    """The options that say which rows are restored, as `restore_checkpoint` takes them.

    With `retrieval`, layers may be "retrieval", which is looked into later.

    Raises:
        QKGuardError: a value outside its choices.
    """
    options: dict[str, Any] = {
        "layers": parse_layers(layers),
        "include_norms": norms,
        "include_sliding_window": sliding_window,
        "shared": shared,
    }
    if projections is not None:
        options["projections"] = sorted(set(parse_names(projections)), reverse=True)
    RowSelection.of(options | ({"layers": None} if retrieval and options["layers"] == RETRIEVAL else {}))
    return options  # type: ignore[return-value]


def current_flags(arguments: Sequence[str]) -> list[str]:
    """A command line with options under their present names; each old one is told of in one line on stderr."""
    renamed = {_flag(old): _flag(new) for old, new in RENAMED.items()}
    if "sweep" in arguments[:1]:
        renamed["--per-layer"] = "--each-layer"
    dropped = {_flag(name): why for name, why in DROPPED.items()}
    out: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag in renamed:
            warn([f"{flag} is called {renamed[flag]} now; the old name works until version 0.3."])
            out.append(f"{renamed[flag]}{equals}{value}")
        elif flag in dropped:
            warn([f"{flag} has no effect any more: {dropped[flag]}."])
            if flag == "--gram" and not equals:
                next(rest, None)  # its value
        else:
            out.append(argument)
    return out


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_names(text: str) -> list[str]:
    """ "q,k", "q k" or "[q, k]" -> ["q", "k"]."""
    return text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()


@contextmanager
def _expecting(option: str, text: str, what: str) -> Iterator[None]:
    """Turn a ValueError met in reading an option into one line that says what is expected."""
    try:
        yield
    except ValueError:
        raise QKGuardError(f"Invalid {option} {text!r}: expected {what}.") from None


def parse_layers(text: str | None) -> list[int] | Literal["retrieval"] | None:
    """ "3,7,11-13" -> [3, 7, 11, 12, 13]; "retrieval" as it is."""
    if text is None or text == RETRIEVAL:
        return text
    layers: set[int] = set()
    with _expecting("--layers", text, "layer numbers such as 3,7,11 or 0-15"):
        for item in parse_names(text):
            first, _, last = item.partition("-")
            layers |= set(range(int(first), int(last or first) + 1))
        if not layers:
            raise ValueError
    return sorted(layers)


def parse_per_layer(text: str | None) -> dict[int, float] | None:
    """ "3=0.5,7=1" -> {3: 0.5, 7: 1.0}."""
    if text is None:
        return None
    pairs = [item.partition("=") for item in parse_names(text)]
    with _expecting("--per-layer", text, "layers and values such as 3=0.5,7=1"):
        values = {int(layer): float(value) for layer, _, value in pairs}
        if not values or len(values) != len(pairs):
            raise ValueError
    return values


def parse_lengths(text: str) -> list[int]:
    """ "512,1K,2k" -> [512, 1024, 2048]."""
    lengths = []
    with _expecting("--lengths", text, "token counts such as 512,4096,32K"):
        for item in parse_names(text.lower()):
            lengths.append(int(float(item[:-1]) * 1024) if item.endswith("k") else int(item))
        if min(lengths) < 1:  # min also refuses an empty list
            raise ValueError
    return lengths


def parse_depths(text: str) -> int | list[float]:
    """ "5" -> 5 depths; "0,0.5,1" or "0.5," -> these."""
    with _expecting("--depths", text, "a number of depths, or a list such as 0,0.5,1"):
        depths = int(text) if text.strip().isdigit() else [float(item) for item in parse_names(text)]
    return depths


def parse_choice(option: str, value: str, choices: tuple[str, ...]) -> str:
    """The value, where it is one of the choices."""
    if value not in choices:
        raise QKGuardError(f"Invalid {option} {value!r}: expected {', '.join(choices)}.")
    return value


def check_file(file: Path | None) -> None:
    """Refuse a file to write whose folder is missing, before anything is measured for it."""
    if file is not None and not file.resolve().parent.is_dir():
        raise QKGuardError(f"{file}: there is no folder {file.resolve().parent}; create it first.")
