"""One training on this rank: rows, TRL's SFTTrainer, the guard."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from trl import SFTTrainer, get_peft_config, get_quantization_config

from qkguard.distributed import ranks, sharding
from qkguard.errors import QKGuardError
from qkguard.sft.arguments import Settings
from qkguard.sft.data import load
from qkguard.sft.launch import check_zero3, refuse_data_parallel
from qkguard.sft.preflight import has_template, preflight, training_tokenizer
from qkguard.training.callback import QKGuardCallback
from qkguard.training.run_folder import RESTORED, run_folder

logger = logging.getLogger(__name__)


def train(settings: Settings) -> Path | None:
    """Train as the settings say; ALL ranks.

    Returns:
        The folder of the final restored model, None where none was asked for.

    Raises:
        QKGuardError: on all ranks, when a check before the first step fails.
    """
    training = settings.training
    refuse_data_parallel(training.use_cpu)
    check_zero3(training.world_size)
    guard = QKGuardCallback(settings.guard)
    ranks.on_rank_zero("checking the recipe", partial(_check, settings))
    tokenizer = training_tokenizer(settings)
    if tokenizer is None:
        raise QKGuardError(f"{settings.model_name} has no tokenizer; save one with the model")
    with training.main_process_first(desc="reading the rows"):
        chat = has_template(tokenizer)
        rows = load(settings.data, chat=chat, seed=training.seed)
        test = settings.data.dataset_test_split
        held_out = load(settings.data, chat=chat, seed=training.seed, split=test) if test else None

    given: Any = training.model_init_kwargs or {}
    training.model_init_kwargs = {
        "revision": settings.model.model_revision,
        "attn_implementation": settings.model.attn_implementation,
        "dtype": settings.model.dtype,
        "trust_remote_code": settings.trusts_remote_code,
        **given,
    }
    try:
        trainer = SFTTrainer(
            model=settings.model_name,
            args=training,
            train_dataset=rows,
            eval_dataset=held_out if training.eval_strategy != "no" else None,
            quantization_config=get_quantization_config(settings.model),
            peft_config=get_peft_config(settings.model),
            callbacks=[guard],
        )
    except (ValueError, ImportError) as error:  # a setting that TRL refuses, a package that one needs
        raise QKGuardError(f"TRL's SFTTrainer refuses these settings: {error}") from error
    keep_names_on_save(trainer.model)
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(resume).lower(), resume))
    if training.push_to_hub:
        trainer.save_model(training.output_dir)
        trainer.push_to_hub()
    if hasattr(trainer, "end"):  # transformers 5.18 and later: trackers and the process group
        trainer.end()
    final = run_folder(settings.guard, training) / "final" / RESTORED
    return final if final.is_dir() else None


def _check(settings: Settings) -> None:
    for warning in preflight(settings).warnings:
        logger.warning("%s", warning)


def keep_names_on_save(model: Any) -> None:
    """Forget weight conversions that loading never used: under ZeRO-3 transformers would reverse them on save.

    Qwen3.5's checkpoints would otherwise get tensor names that no class loads.
    """
    # Private to transformers, which has no public way to drop one (needed as of 5.23)
    conversions = getattr(model, "_weight_conversions", None)
    if conversions and sharding.backend(model) == "zero3":
        model._weight_conversions = [c for c in conversions if not hasattr(c, "was_used") or c.was_used()]
