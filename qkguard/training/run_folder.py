"""Where a guarded run puts its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from qkguard.report.run import RUN_FOLDER

if TYPE_CHECKING:
    from qkguard.training.config import QKGuardConfig

RESTORED = "qk_restored"
"""The restored model's folder inside a checkpoint and in `final`."""

FINAL = "final"
"""The final models' folder in the run folder."""

RECOMMENDED = "RECOMMENDED"
"""The file in `final` that names the folder to ship, by the verdict."""


def run_folder(config: QKGuardConfig, args: TrainingArguments) -> Path:
    """The folder of a run's reference, metrics and final models."""
    return (config.output_dir or Path(str(args.output_dir)) / RUN_FOLDER).absolute()  # a script may chdir
