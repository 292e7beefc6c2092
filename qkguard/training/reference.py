"""The reference of a run: its queries and keys from before SFT, established before the first step."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkguard.checkpoint.manifest import MANIFEST, versions
from qkguard.checkpoint.reference_file import ReferenceFile, write_reference
from qkguard.checkpoint.weights import BaseFolder, open_weights, resolve_folder
from qkguard.distributed import ranks
from qkguard.distributed.reference import Reference
from qkguard.errors import QKGuardError, WrongReferenceError
from qkguard.layout import ParamMap, disk_names
from qkguard.layout.selection import Selection
from qkguard.offline.configs import compare_configs, read_config
from qkguard.report.run import RUN_FOLDER
from qkguard.training.loader_check import compare_with_own_checkpoint, model_name

if TYPE_CHECKING:
    from qkguard.training.config import QKGuardConfig

logger = logging.getLogger(__name__)


def establish_reference(
    model: Any,
    selection: Selection,
    folder: Path,
    config: QKGuardConfig,
    *,
    resumed: bool,
    writers: Sequence[int],
) -> tuple[Reference, str]:
    """The pre-SFT rows of this run, and a clause that says where they come from; ALL ranks must call this.

    A named `base_model` always wins. A resumed run reads its reference from the run folder, because its live weights
    have moved. At step 0 the reference is taken from the live weights; one that is already there must be bit-equal.

    Args:
        writers: the ranks that write the reference into their `folder`.

    Raises:
        QKGuardError: on all ranks, when the reference would be wrong or cannot be had.
    """
    maps = [pmap for _, pmaps in selection for pmap in pmaps]

    if config.base_model not in (None, "live"):
        base = str(config.base_model)
        source = ranks.held_by(0, f"opening base_model {base}", partial(open_base, base, maps, model))
        reference = Reference.scatter(model, selection, source)
        write_reference(reference, folder, _about(model, {"id": base, "checked": "read from base_model"}), writers)
        return reference, f"read from base_model {base}"

    if resumed:
        file = ranks.held_by(0, "reloading the reference", partial(ReferenceFile, folder))
        return Reference.scatter(model, selection, file), "verified and reloaded, because the run is resumed"

    ranks.on_rank_zero("checking the starting weights", partial(refuse_guarded_checkpoint, model))
    if ranks.on_rank_zero("looking for the reference", partial(ReferenceFile.exists, folder)):
        file = ranks.held_by(0, "opening the reference", partial(ReferenceFile, folder))
        reference = Reference.scatter(model, selection, file)
        refuse_other_start(reference, model, folder)
        origin = "found from an earlier start, bit-equal to the live weights"
    else:
        reference = Reference.take(model, selection)
        write_reference(reference, folder, _about(model, {"id": model_name(model) or "live weights"}), writers)
        origin = "taken from the live weights"
    try:
        compared = compare_with_own_checkpoint(model, folder, maps, live=config.base_model == "live")
    except WrongReferenceError:
        if ranks.rank() in writers:  # else it would stand in the way of the next start, with the right weights
            ReferenceFile.discard(folder)
        raise
    return reference, f"{origin}, {compared}"


def open_base(base: str, maps: Sequence[ParamMap], model: Any) -> BaseFolder:
    """The rows in a base checkpoint's own files; QKGuardError where it does not fit the model (one process).

    Where its config differs from the model's, a warning says so.
    """
    weights = open_weights(resolve_folder(base))
    if (weights.folder / "config.json").is_file():
        for line in compare_configs(read_config(weights.folder), model.config.get_text_config().to_dict()):
            logger.warning("base_model: %s.", line)
    source = BaseFolder(weights, disk_names(maps, weights.shapes(), model), model_id=base)
    source.check(maps)
    return source


def refuse_guarded_checkpoint(model: Any) -> None:
    """Refuse a model from inside a guarded run: its queries and keys have been through SFT (one process)."""
    name = model_name(model)
    if not name or not os.path.isdir(name):
        return
    here = Path(name).resolve()
    run = _guarded_run(here)
    if run or (here / MANIFEST).is_file():
        where = f"the guarded run {run}" if run else "a checkpoint that qkguard wrote"
        raise QKGuardError(
            f"The model was loaded from {here}, inside {where}, so it is not the model before SFT. Continue that run "
            "with resume_from_checkpoint, or name the model that counts as pre-SFT: QKGuardConfig(base_model=...). It "
            "may be this very folder."
        )


def _guarded_run(folder: Path) -> Path | None:
    """The guarded run that a folder belongs to: checkpoints and final models lie at most three levels deep in it."""
    above = list(folder.parents)[:3]
    for candidate in (folder, *above):
        if ReferenceFile.exists(candidate / RUN_FOLDER):
            return candidate
    for candidate in above:  # a run folder of another name (output_dir=...)
        if ReferenceFile.exists(candidate):
            return candidate
    return None


def refuse_other_start(reference: Reference, model: Any, folder: Path) -> None:
    """Refuse the reference of another run: it must be bit-equal to the live weights; ALL ranks must call this."""
    changed = reference.changed(model)
    if changed:
        raise WrongReferenceError(
            f"{folder} holds the reference of another run: {len(changed)} of {len(reference.maps)} parameters differ "
            f"from the weights that training starts with, first {changed[0]}. Resume that run "
            "(resume_from_checkpoint), choose another output_dir, name the pre-SFT checkpoint with base_model=..., or "
            f"delete {folder}."
        )


def _about(model: Any, base: dict[str, Any]) -> dict[str, Any]:
    """What the reference's manifest says beside its tensors."""
    return {"base": base, "model_type": getattr(model.config, "model_type", None), "versions": versions()}
