"""What a user should know before the first step, each in one line with what to do."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from qkguard.distributed import sharding
from qkguard.training.packing import packing_warnings

RENAMED = (
    "Trainer will save this model under other tensor names than its base has, and it may not load again: under ZeRO-3 "
    "transformers keeps weight conversions that loading never used, and reverses them on save. Repair it before "
    "train(): model._weight_conversions = [c for c in model._weight_conversions if c.was_used()]"
)
NOT_GATHERED = (
    "ZeRO-3 runs without stage3_gather_16bit_weights_on_model_save, so Trainer's checkpoints hold no loadable weights."
    " qkguard writes them to checkpoint-N/raw, gathering one parameter at a time."
)


def warnings_at_start(model: Any, args: TrainingArguments, collator: Any = None) -> list[str]:
    """Warnings about how samples are packed and how Trainer will save this model (one process)."""
    warnings = packing_warnings(model.config, args, collator)
    if sharding.backend(model) != "zero3":
        return warnings
    if _saves_under_other_names(model):
        warnings.append(RENAMED)
    is_peft = hasattr(model, "peft_config")  # adapters are saved whole either way
    if not is_peft and not _gathers_on_save(args):
        warnings.append(NOT_GATHERED)
    return warnings


def _saves_under_other_names(model: Any) -> bool:
    """Whether weight conversions that loading never used change the names that `save_pretrained` writes.

    transformers' way of loading under DeepSpeed keeps all conversions in the private `_weight_conversions` (5.17 to
    5.23; seen with Qwen3.5).
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    used = [c for c in conversions if not hasattr(c, "was_used") or c.was_used()]
    if len(used) == len(conversions):
        return False
    try:
        names = _names_on_save(model)
        model._weight_conversions = used or None
        return names != _names_on_save(model)
    except Exception:  # a conversion that wants real shapes does more than rename
        return True
    finally:
        model._weight_conversions = conversions


def _names_on_save(model: Any) -> set[str]:
    from transformers.core_model_loading import revert_weight_conversion

    empty = {name: torch.empty(0, device="meta") for name, _ in model.named_parameters()}
    return set(revert_weight_conversion(model, empty))


def _gathers_on_save(args: TrainingArguments) -> bool:
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None:
        plugin = getattr(args, "deepspeed_plugin", None)
        config = getattr(plugin, "hf_ds_config", None)
    value = config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save") if config else None
    return bool(value)
