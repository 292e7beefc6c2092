"""Which architectures keep packed samples apart.

Packing puts several samples into one sequence. Softmax attention is told apart by position ids or a mask; a layer with
a recurrent state or a convolution must be told where samples begin, or the state of one runs into the next. TRL 1.16
passes `seq_idx` (for convolutions and Mamba-2) and `cu_seq_lens_q`; what a model's layers do with them is read off
transformers 5.23's modelling code, and held by a test that watches the arguments arrive.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

from packaging.version import Version

from qkguard.errors import QKGuardError
from qkguard.layout.layers import OTHER_TYPES, layer_types

CHECKED = {"transformers": "5.23", "trl": "1.16"}

CONVOLUTION = ("causal_conv1d",)  # causal_conv1d_fn takes seq_idx
DELTA_RULE = ("fla", "causal_conv1d")  # chunk_gated_delta_rule takes cu_seqlens, made from cu_seq_lens_q
MAMBA2 = ("mamba_ssm", "causal_conv1d")  # mamba_split_conv1d_scan_combined takes seq_idx

# model type -> the kernel packages that keep samples apart; without them transformers stops at the first step
KEEPS_APART: dict[str, tuple[str, ...]] = {
    "qwen3_next": DELTA_RULE,
    "qwen3_5": DELTA_RULE,
    "qwen3_5_text": DELTA_RULE,
    "qwen3_5_moe": DELTA_RULE,
    "qwen3_5_moe_text": DELTA_RULE,
    "olmo_hybrid": DELTA_RULE,
    "nemotron_h": MAMBA2,
    "granitemoehybrid": MAMBA2,
    "falcon_h1": MAMBA2,
    "lfm2": CONVOLUTION,
    "lfm2_moe": CONVOLUTION,
}
# model type -> what its layers do with the boundaries
IGNORES = {
    "kimi_linear": "its delta-attention layers get no sequence boundaries",  # cu_seq_lens_q never becomes cu_seqlens
    "minimax": "its lightning-attention layers have no argument for sequence boundaries",
}
PIP_NAMES = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}
NO_PACKING = "set packing: false and padding_free: false"
NO_PACKING_IN_PYTHON = "Set packing=False and padding_free=False, and take a collator that pads."


def is_packed(training: Any, collator: Any = None) -> bool:
    """Whether several samples share a sequence: by TRL's settings, by axolotl's, or by the collator that is used."""
    if any(getattr(training, name, False) for name in ("packing", "padding_free", "sample_packing")):
        return True
    inner = getattr(collator, "data_collator", collator)  # Trainer wraps it to drop columns
    return "Flattening" in type(inner).__name__ or bool(getattr(inner, "padding_free", False))


def check_packing(config: Any, training: Any) -> list[str]:
    """Refuse packing where samples would run into one another; name kernel packages that are not installed.

    Args:
        config: the model's config.
        training: SFTConfig.

    Returns:
        Warnings: what must be installed where the training runs.

    Raises:
        QKGuardError: packing is on, and the architecture ignores sequence boundaries or is not known to keep them.
    """
    if not is_packed(training):
        return []
    if problem := what_mixes(config):
        raise QKGuardError(f"{problem}; {NO_PACKING}.")
    return missing_kernels(config)


def packing_warnings(config: Any, training: Any, collator: Any = None) -> list[str]:
    """The same of a training in the user's own script, where it is not refused."""
    if not is_packed(training, collator):
        return []
    if problem := what_mixes(config):
        return [f"{problem}. {NO_PACKING_IN_PYTHON}"]
    inner = getattr(collator, "data_collator", collator)
    flags = ("return_seq_idx", "return_flash_attn_kwargs")  # of transformers' collator, both off by default
    if config.model_type in KEEPS_APART and not all(getattr(inner, flag, True) for flag in flags):
        return [
            f"{type(inner).__name__} does not tell the linear layers of {config.model_type} where samples begin. "
            "Set return_seq_idx=True and return_flash_attn_kwargs=True."
        ]
    return [f"{text}." for text in missing_kernels(config)]


def what_mixes(config: Any) -> str | None:
    """Why packed samples of a model would run into one another, as a clause; None where they do not."""
    kind = config.model_type
    if kind in IGNORES:
        return f"Packing would mix samples in {kind}: {IGNORES[kind]}"
    if kind not in KEEPS_APART:
        known = ", ".join(sorted(KEEPS_APART))
        unknown = f"Packing is not known to keep samples apart in the linear layers of {kind} (it is in {known})"
        return unknown if _is_hybrid(config) else None
    for package, least in CHECKED.items():
        found = importlib.metadata.version(package)
        if Version(found) < Version(least):
            return (
                f"Packing {kind} needs {package} {least} or later, which passes sequence boundaries to its linear "
                f"layers; found {found}"
            )
    return None


def missing_kernels(config: Any) -> list[str]:
    """The kernel packages that keep packed samples of a model apart and are not installed, in one clause."""
    kind = config.model_type
    missing = [PIP_NAMES[name] for name in KEEPS_APART.get(kind, ()) if importlib.util.find_spec(name) is None]
    if not missing:
        return []
    return [
        f"Packing {kind} needs {' and '.join(missing)} where it trains (pip install {' '.join(missing)}), not "
        "installed here; without it transformers stops at the first step"
    ]


def _is_hybrid(config: Any) -> bool:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = {*(layer_types(config) or ()), *(getattr(text, "layers_block_type", None) or ())}
    return bool(kinds & (OTHER_TYPES - {"moe", "mlp"} | {"hybrid", "hybrid_sliding"}))
