"""What the stages share: the way to the demo's modules, and how a model is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

DEMO = Path(__file__).parents[1] / "demo"
for folder in (DEMO, DEMO.parents[1]):  # the demo's data, model and schedule; qkguard where it is not installed
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import torch  # noqa: E402
from fast import speed_up  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

HERE = Path(__file__).parent
LAYERS = "LLLALL"  # L lightning, A softmax: one layer carries all exact retrieval
POSITIONS = 131072  # nothing depends on it (no position encoding); it bounds what a prober accepts


def write_json(path: Path, data) -> None:
    """All of it or nothing: other stages may be waiting for the file."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.rename(path)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(folder):
    """The model of a folder in float32, in its fast form, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    return speed_up(model).eval()


def load_tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, model_max_length=POSITIONS)
