"""Options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qkguard.errors import QKGuardError
from qkguard.layout.rows import RowOptions, RowSelection

Base = Annotated[str, typer.Option("--base", "-b", help="Checkpoint before SFT: a folder or a hub id.")]
Tuned = Annotated[str, typer.Option("--tuned", "-t", help="Checkpoint after SFT: a folder or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Projections = Annotated[str, typer.Option(help="Which projections: q, k or q,k.")]
Layers = Annotated[
    str | None, typer.Option(help="Decoder layers, counted from 0: 3,7,11 or 0-15. Default: every softmax layer.")
]
Norms = Annotated[bool, typer.Option("--include-norms", help="Also the gains of q/k normalisation.")]
Sliding = Annotated[
    bool,
    typer.Option("--sliding-window/--no-sliding-window", help="Sliding-window layers count as softmax attention."),
]
Shared = Annotated[
    str,
    typer.Option(help="Rows that feed keys and values alike (MLA): keep (leave them tuned), restore or refuse."),
]
Spec = Annotated[
    Path | None,
    typer.Option("--spec", help="Attention layout by hand (YAML), for models that cannot be probed.", dir_okay=False),
]
Method = Annotated[str, typer.Option(help="Restore method: restore, qk-pro, procrustes or interpolate.")]
Ridge = Annotated[
    float, typer.Option(help="qk-pro: 0 is restore, larger keeps more of the tuned queries (units: mean eigenvalue).")
]
Alpha = Annotated[float, typer.Option(help="interpolate: from 0 (tuned) to 1 (before SFT).")]
Align = Annotated[
    bool, typer.Option("--align", help="interpolate: first rotate the base's heads towards the tuned ones.")
]
PerLayer = Annotated[
    str | None,
    typer.Option("--per-layer", help="Ridge or alpha of single layers, e.g. 3=0.5,7=1.", metavar="LAYER=VALUE,..."),
]
MODES = ("auto", "chat", "plain")

RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow the checkpoint's own model code to be imported.")
]
Depths = Annotated[str, typer.Option(help="How many needle depths, or a list such as 0,0.5,1.")]
Samples = Annotated[int, typer.Option(min=1, help="Probe samples for every task, length and depth.")]
Tasks = Annotated[str, typer.Option(help="RULER tasks: single_1-3 (or S1-S3), multikey_1-3, multivalue, multiquery.")]
Haystack = Annotated[
    str | None, typer.Option(help="Text for the haystacks: .txt, .md, .json or .jsonl. Default: generated.")
]
Mode = Annotated[str, typer.Option(help="auto, chat or plain prompts; auto uses a chat template where there is one.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help='"auto" (all accelerators), cpu, cuda:1, ...')]
BatchTokens = Annotated[
    int, typer.Option(min=1, help="Tokens in one forward pass of the probe, where several samples fit.")
]
Chunk = Annotated[
    int | None,
    typer.Option(
        help="Read longer contexts in pieces of so many tokens; 0 never. Default: above 32K.", show_default=False
    ),
]


def row_selection(
    layers: str | None, norms: bool, sliding_window: bool, shared: str, projections: str | None = None
) -> RowOptions:
    """The options that say which rows are restored, as `restore_checkpoint` takes them.

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
        options["projections"] = sorted(set(projections.replace(",", " ").split()), reverse=True)
    RowSelection.of(options)
    return options  # type: ignore[return-value]


OLD_FLAGS = {"--parts": "--projections", "--strengths": "--per-layer", "--entangled": "--shared"}
"""Options by their names in 0.1; they work until 0.3."""


def current_flags(arguments: Sequence[str]) -> list[str]:
    """A command line with options under their present names; each old one is told of in one line on stderr."""
    renamed = OLD_FLAGS | ({"--per-layer": "--each-layer"} if "sweep" in arguments[:1] else {})
    out: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag in renamed:
            print(f"warning: {flag} is called {renamed[flag]} now; it works until version 0.3", file=sys.stderr)
            argument = f"{renamed[flag]}{equals}{value}"
        elif flag == "--gram":
            print("warning: --gram has no effect any more: qk-pro has one reading", file=sys.stderr)
            if not equals:
                next(rest, None)
            continue
        elif flag == "--allow-pickle":
            print("warning: --allow-pickle has no effect any more: pickles are not read", file=sys.stderr)
            continue
        out.append(argument)
    return out


def parse_layers(text: str | None) -> list[int] | None:
    """ "3,7,11-13" -> [3, 7, 11, 12, 13]."""
    if text is None:
        return None
    try:
        layers: set[int] = set()
        for item in text.replace(",", " ").split():
            first, _, last = item.partition("-")
            layers |= set(range(int(first), int(last or first) + 1))
    except ValueError:
        layers = set()
    if not layers:
        raise QKGuardError(f"--layers {text!r} is not a list of layer numbers such as 3,7,11 or 0-15")
    return sorted(layers)


def parse_per_layer(text: str | None) -> dict[int, float] | None:
    """ "3=0.5,7=1" -> {3: 0.5, 7: 1.0}."""
    if text is None:
        return None
    pairs = [item.partition("=") for item in text.replace(",", " ").split()]
    try:
        values = {int(layer): float(value) for layer, _, value in pairs}
    except ValueError:
        values = {}
    if not values or len(values) != len(pairs):
        raise QKGuardError(f"--per-layer {text!r} is not a list of layers and values such as 3=0.5,7=1")
    return values


def parse_lengths(text: str) -> list[int]:
    """ "512,1K,2k" -> [512, 1024, 2048]."""
    try:
        lengths = [
            int(float(item[:-1]) * 1024) if item[-1] in "kK" else int(item) for item in text.replace(",", " ").split()
        ]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise QKGuardError(f"--lengths {text!r} is not a list of lengths such as 512,4096,32K")
    return lengths


def parse_depths(text: str) -> int | list[float]:
    """ "5" -> 5 depths; "0,0.5,1" or "0.5," -> these."""
    try:
        return int(text) if text.strip().isdigit() else [float(item) for item in text.replace(",", " ").split()]
    except ValueError:
        raise QKGuardError(f"--depths {text!r} is neither a number of depths nor a list such as 0,0.5,1") from None


def parse_choice(option: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise QKGuardError(f"{option} {value!r} is not known; expected one of: {', '.join(choices)}")
    return value


def check_file(file: Path | None) -> None:
    """Refuse a file to write whose folder is missing, before anything is measured for it."""
    if file is not None and not (folder := file.resolve().parent).is_dir():
        raise QKGuardError(f"{file}: there is no folder {folder}; make it first")
