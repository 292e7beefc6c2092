"""`--dry-run --diagnose`: the diagnosis of a recipe's model on its own training rows."""

from __future__ import annotations

from pathlib import Path

from qkguard.errors import QKGuardError
from qkguard.offline.diagnose import Diagnosis, diagnose
from qkguard.offline.diagnosed_rows import spread
from qkguard.offline.models import OpenBar, no_bar
from qkguard.sft.arguments import Settings
from qkguard.sft.preflight import Preflight

ROWS = 32
LONGEST = 4096  # tokens of a row: all of its activations are in memory at once, without checkpointing


def diagnose_training(
    settings: Settings, found: Preflight, against: Path | None = None, bar: OpenBar = no_bar
) -> Diagnosis:
    """Diagnose the model on rows of the training data, tokenised, labelled and cut as TRL would.

    Packed trainings are measured sample by sample: packing that mixes samples is refused before.

    Raises:
        QKGuardError: there is no tokenizer, or as `diagnose`.
    """
    if found.tokenizer is None:
        raise QKGuardError(f"{settings.model_name} has no tokenizer, so its training rows cannot be diagnosed.")
    training, revision = settings.training, settings.model.model_revision
    limit = min(training.max_length or LONGEST, LONGEST)
    completion_only = training.completion_only_loss is not False  # TRL: None is "where there are completions"
    diagnosis = diagnose(
        settings.model_name if revision in (None, "main") else f"{settings.model_name}@{revision}",
        spread(found.sampled.rows, ROWS),
        against=against,
        tokenizer=found.tokenizer,
        max_length=limit,
        completion_only=completion_only,
        assistant_only=bool(training.assistant_only_loss),
        device="cpu" if training.use_cpu else "auto",
        trust_remote_code=settings.trusts_remote_code,
        bar=bar,
    )
    if training.max_length is None or training.max_length > limit:
        diagnosis.warnings.append(f"rows were cut at {limit} tokens for the diagnosis, to bound its memory")
    return diagnosis
