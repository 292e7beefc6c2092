"""The base that the demo fine-tunes: the packaged model with one head rescaled, chosen for the effect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
LAYER, KEY_HEAD = 2, 0
"""The key head whose query heads find needles in the packaged model."""


def write_base(model: Path, out: Path, factor: float) -> None:
    """Copy `model` to `out` with one head's keys divided by `factor` and the queries that look at them times it.

    Attention logits are products of the two, so the copy computes what the original does. AdamW moves every weight by
    about as much at a step, whatever its size: keys this small move far relative to their size. In float32, in which
    they keep their digits.
    """
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    queries = config["num_attention_heads"] // config["num_key_value_heads"]
    weights = {name: values.float() for name, values in load_file(out / WEIGHTS).items()}
    for projection, heads, by in (("q", queries, factor), ("k", 1, 1 / factor)):
        rows = heads * config["head_dim"]
        weight = weights[f"model.layers.{LAYER}.self_attn.{projection}_proj.weight"]
        weight[KEY_HEAD * rows : (KEY_HEAD + 1) * rows] *= by
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
