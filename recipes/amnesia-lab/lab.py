"""What the stages share: the way to the demo's modules, command lines, files, and how a model is loaded.

torch and transformers are imported where they are used: run_all.py and figures.py do without.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

DEMO = Path(__file__).parents[1] / "demo"
for folder in (DEMO, DEMO.parents[1]):  # the demo's data, model and schedule; qkguard where it is not installed
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

HERE = Path(__file__).parent
LAYERS = "LLLALL"  # L lightning, A softmax: one layer carries all exact retrieval
POSITIONS = 131072  # nothing depends on it (no position encoding); it bounds what a prober accepts


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The text of the script as it is, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser(text: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=text, formatter_class=Help)


def write(path: Path, text: str) -> None:
    """All of it or nothing: other stages may be waiting for the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)


def write_json(path: Path, data) -> None:
    write(path, json.dumps(data, indent=1) + "\n")


def made(path: Path, settings: Mapping) -> bool:
    """Whether a stage has written `path`, with these settings; ends the program where they were others."""
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    if others := {k: found.get(k) for k, v in settings.items() if found.get(k) != v}:
        raise SystemExit(
            f"{path} was made with {others}, not with { {k: settings[k] for k in others} }; name another --out"
        )
    return True


def base(folder: Path) -> dict:
    """What pretrain.py wrote of a base: which it is, wherever it lies."""
    if not (folder / "pretrain.json").exists():
        raise SystemExit(f"{folder} holds no base; pretrain.py --out {folder} makes one")
    return json.loads((folder / "pretrain.json").read_text())


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load(folder):
    """The model of a folder in float32, in its fast form, on the CPU."""
    import torch
    from fast import speed_up
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    return speed_up(model).eval()


def load_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, model_max_length=POSITIONS)
