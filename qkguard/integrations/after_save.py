"""For frameworks that train without transformers' Trainer, but call a hook when a checkpoint is saved."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def restore_after_save(
    base: str | os.PathLike[str], folder: str | os.PathLike[str], *, strict: bool = False, **options: Any
) -> Path | None:
    """Write `folder/qk_restored` beside the Hugging Face files that a framework has just saved in `folder`.

    For a hook after a save, on all ranks or on one: rank 0 of torch's process group works, and no rank waits for
    another here. All files must be there already; what the hook's caller does next waits until the folder is written,
    in bounded memory. A failure is one line in the log unless `strict`.

        def hook(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):
            restore_after_save(args.hf_checkpoint, hf_checkpoint_dir)

    Args:
        base: the checkpoint before SFT, a folder or a hub id.
        folder: the saved checkpoint: config.json and safetensors, not a framework's own format. An earlier restored
            folder in it is replaced.
        strict: raise instead of logging.
        options: those of `qkguard.restore_checkpoint`: method, ridge, alpha, layers, trust_remote_code, ...

    Returns:
        The restored folder; None on other ranks, and after a failure.

    Raises:
        QKGuardError: if `strict`, what went wrong.
    """
    # here: the room is also imported by what only asks where a file is
    from qkguard.distributed import ranks
    from qkguard.offline.restore import restore_checkpoint
    from qkguard.training.attempt import LATER, attempt
    from qkguard.training.run_folder import RESTORED

    if ranks.rank() != 0:
        return None
    target = Path(folder) / RESTORED
    with attempt(f"restoring {folder}", strict=strict, advice=LATER):
        restore_checkpoint(base, folder, target, overwrite=True, **options)
        logger.info("Wrote %s.", target)
        return target
    return None
