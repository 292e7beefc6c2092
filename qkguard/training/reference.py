"""The reference of a run: its queries and keys from before SFT, established before the first step.

Before the first step only the rows must be copied. The rest takes seconds for large models and goes on in a thread
(`PendingReference`): the ranks send their rows to those that write, over a gloo group that nothing else uses, and rank
0 reads the base's files.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkguard.checkpoint.manifest import MANIFEST, versions
from qkguard.checkpoint.reference_file import ReferenceFile, write_reference
from qkguard.checkpoint.weights import BaseFolder, open_weights, resolve_folder
from qkguard.distributed import ranks
from qkguard.distributed.reference import Reference
from qkguard.errors import QKGuardError, WrongReferenceError, reason_of
from qkguard.layout import ParamMap, disk_names
from qkguard.layout.selection import Selection
from qkguard.offline.configs import compare_configs, read_config
from qkguard.report.run import RUN_FOLDER
from qkguard.training.loader_check import Comparison, model_name, plan_comparison

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
) -> tuple[Reference, PendingReference]:
    """The pre-SFT rows of this run, and what is still to be done about their file; ALL ranks must call this.

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
        about = _about(model, {"id": base, "checked": "read from base_model"})
        return reference, PendingReference(reference, folder, f"read from base_model {base}", writers, about=about)

    if resumed:
        file = ranks.held_by(0, "reloading the reference", partial(ReferenceFile, folder))
        reference = Reference.scatter(model, selection, file)
        return reference, PendingReference(
            reference, folder, "verified and reloaded, because the run is resumed", writers
        )

    ranks.held_by(0, "checking the starting weights", partial(refuse_guarded_checkpoint, model))
    comparison = plan_comparison(model, maps, live=config.base_model == "live")
    if ranks.on_rank_zero("looking for the reference", partial(ReferenceFile.exists, folder)):
        file = ranks.held_by(0, "opening the reference", partial(ReferenceFile, folder))
        reference = Reference.scatter(model, selection, file)
        refuse_other_start(reference, model, folder)
        origin = "found from an earlier start, bit-equal to the live weights"
        return reference, PendingReference(reference, folder, origin, writers, comparison=comparison)
    reference = Reference.take(model, selection)
    about = _about(model, {"id": model_name(model) or "live weights"})
    origin = "taken from the live weights"
    return reference, PendingReference(reference, folder, origin, writers, about=about, comparison=comparison)


class PendingReference:
    """A reference whose file is written and compared with the base beside the first steps; ALL ranks must make one.

    Nothing is restored before that is done (`wait`). A failure stops the run on all ranks when they meet next.

    Args:
        reference: the rows, each rank's part in its memory.
        folder: where their file is, or will be.
        origin: a clause that says where they come from.
        writers: the ranks that write, each into its own `folder`.
        about: what the file's manifest says beside the tensors; None where the file is there.
        comparison: rank 0's, with the base checkpoint; a clause where none is made.

    Attributes:
        compared: on rank 0 a clause on what the rows were compared with; None before that is done.
    """

    def __init__(
        self,
        reference: Reference,
        folder: Path,
        origin: str,
        writers: Sequence[int],
        *,
        about: Mapping[str, Any] | None = None,
        comparison: Comparison | str | None = None,
    ) -> None:
        self.reference, self.folder, self.writers, self.about = reference, folder, writers, about
        self.comparison, self.origin = comparison, origin
        self.compared = comparison if isinstance(comparison, str) else None
        self.failure: WrongReferenceError | None = None
        self.whole = False
        self._group = ranks.side_group() if about is not None and ranks.world_size() > 1 else None
        self._rank = ranks.rank()
        self._thread = threading.Thread(target=self._run, name="qkguard-reference", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self.about is not None:
                write_reference(self.reference, self.folder, self.about, self.writers, self._group)
            if isinstance(self.comparison, Comparison):
                self.compared = self.comparison.run(self.folder)
                logger.info("The reference is %s.", self.compared)
        except Exception as error:
            if self.comparison is not None:  # rank 0's; the file would stand in the way of the next start
                ReferenceFile.discard(self.folder)
            self.failure = _failure(error, self._rank)

    def check(self) -> None:
        """Raise what has failed on this rank so far; to be called where the ranks agree."""
        if self.failure is not None:
            raise self.failure

    def wait(self) -> None:
        """Until the file is whole and compared; ALL ranks must call this.

        Raises:
            WrongReferenceError: on all ranks, when the file could not be written, or the weights are not those of
                their own checkpoint.
        """
        if not self.whole:
            ranks.agree("waiting for the reference", self._wait)
            self.whole = True

    def _wait(self) -> None:
        self._thread.join()
        self.check()


def _failure(error: Exception, rank: int) -> WrongReferenceError:
    """The error that ends the run, in a complete sentence."""
    if isinstance(error, WrongReferenceError):
        failure = error
    else:
        failure = WrongReferenceError(f"Writing the reference failed on rank {rank}: {reason_of(error)}")
    failure.complete = True
    return failure


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
