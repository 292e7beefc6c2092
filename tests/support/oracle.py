"""Where queries and keys are in the tiny checkpoints, written down by hand, and what a restore must give.

Shares nothing with qkguard but the safetensors library: row ranges are those of the architectures' papers and code.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

HEADS, HEAD = 4, 16
Rows = tuple[int, list[tuple[int, int]] | None]  # dimension, half-open ranges (None: all)

_PLAIN: dict[str, Rows] = {r"self_attn\.[qk]_proj\.weight$": (0, None)}
_LAST: dict[str, Rows] = {r"layers\.3\.self_attn\.[qk]_proj\.weight$": (0, None)}
_GATED: dict[str, Rows] = {
    r"layers\.3\.self_attn\.k_proj\.weight$": (0, None),
    # head by head: query rows, then as many rows of the output gate
    r"layers\.3\.self_attn\.q_proj\.weight$": (0, [(2 * HEAD * h, 2 * HEAD * h + HEAD) for h in range(HEADS)]),
}
ROWS: dict[str, dict[str, Rows]] = {
    "llama": _PLAIN,
    "qwen3": _PLAIN,
    "qwen2": {r"self_attn\.[qk]_proj\.(weight|bias)$": (0, None)},
    "phi3": {r"self_attn\.qkv_proj\.weight$": (0, [(0, (HEADS + 2) * HEAD)])},
    "gpt_neox": {
        r"attention\.query_key_value\.(weight|bias)$": (
            0,
            [(3 * HEAD * h, 3 * HEAD * h + 2 * HEAD) for h in range(HEADS)],
        )
    },
    "gpt2": {r"attn\.c_attn\.weight$": (1, [(0, 128)]), r"attn\.c_attn\.bias$": (0, [(0, 128)])},
    "minimax": {r"layers\.[13]\.self_attn\.[qk]_proj\.weight$": (0, None)},
    "qwen3_next": _GATED,
    "qwen3_5_text": _GATED,
    "olmo_hybrid": _LAST,
    "granitemoehybrid": _LAST,
}


def load_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint or of an adapter, through the safetensors library."""
    index = folder / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else None
    out: dict[str, Tensor] = {}
    one = "adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors"
    for file in files or [one]:
        out |= load_file(folder / file)
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def expected(
    name: str, base: dict[str, Tensor], raw: dict[str, Tensor], step0: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors a restored checkpoint must hold: raw, with the base's rows cast to step 0's dtype, then raw's."""
    out = {key: tensor.clone() for key, tensor in raw.items()}
    touched = 0
    for pattern, (dim, ranges) in ROWS[name].items():
        for key in (key for key in out if re.search(pattern, key)):
            before = base[key].to(step0 or base[key].dtype).to(out[key].dtype)
            for lo, hi in ranges or [(0, out[key].shape[dim])]:
                out[key].narrow(dim, lo, hi - lo).copy_(before.narrow(dim, lo, hi - lo))
            touched += not same_bits(out[key], raw[key])
    assert touched, "base and tuned agree everywhere: the check could not fail"
    return out


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are missing, superfluous or differ by a bit."""
    return sorted(
        name
        for name in found.keys() | wanted.keys()
        if name not in found or name not in wanted or not same_bits(found[name], wanted[name])
    )
