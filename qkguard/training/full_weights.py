"""Full-parameter training as the guard sees it: drift from a reference, and restored models beside the raw ones.

`adapter_weights.AdapterWeights` is the same for adapters; `session.Session` works with either.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qkguard.checkpoint.reference_file import REFERENCE, ReferenceFile
from qkguard.checkpoint.restored import plan_restored
from qkguard.checkpoint.staging import Staging
from qkguard.checkpoint.weights import open_weights
from qkguard.checkpoint.write import FolderPlan, Record, prepare, publish, write_files, write_folder
from qkguard.choice.swap import restored
from qkguard.distributed import ranks
from qkguard.distributed.reference import Reference
from qkguard.layout import disk_names
from qkguard.layout.selection import unselected_norms
from qkguard.restore.registry import get_method
from qkguard.training.drift_monitor import DriftMonitor
from qkguard.training.export import export_model, holds_weights, link_checkpoint
from qkguard.training.run_folder import RESTORED
from qkguard.training.start_lines import layers_of, saving_line, size_of
from qkguard.training.writers import Writers, disk_is_shared

if TYPE_CHECKING:
    from qkguard.training.config import QKGuardConfig


class FullWeights:
    """Queries and keys that are trained whole.

    Attributes:
        drift_monitor: measures drift from the reference.
        swap: opens a context in which the live model has restored queries and keys.
        staging: where folders are assembled (`FolderPlan`); set when a `train()` begins.
    """

    def __init__(
        self,
        config: QKGuardConfig,
        model: nn.Module,
        folder: Path,
        writers: Writers,
        reference: Reference,
        origin: str,
    ) -> None:
        self.config, self.model, self.folder, self.writers = config, model, folder, writers
        self.reference, self.origin, self.selection = reference, origin, reference.selection
        self.drift_monitor = DriftMonitor(reference)
        self.swap = partial(restored, model, reference, method=config.method, **config.method_options)
        self.staging: Path | None = None
        self._shared: dict[Path, bool] = {}

    def describe(self) -> list[str]:
        """Lines for the log: what is guarded, what it is compared with, and what will be written."""
        reference, config = self.reference, self.config
        maps = reference.maps.values()
        kept = sum(pmap.numel * reference.slices[pmap.name].element_size() for pmap in maps)
        here = "" if ranks.world_size() == 1 else f", {size_of(reference.nbytes)} of it on this rank"
        layers = layers_of([spec.layer for spec, _ in self.selection], _layer_count(self.model))
        return [
            f"Guarding the queries and keys of {layers}: {sum(pmap.numel for pmap in maps):,} elements in {len(maps)} "
            f"parameters. Kept in CPU memory: {size_of(kept)}{here}.",
            f"Reference: {self.origin}. File: {self.folder / REFERENCE}.",
            saving_line("Restored checkpoints", config, f"checkpoint-N/{RESTORED}", self.folder / "final"),
        ]

    def write_checkpoint(self, checkpoint: Path, record: Mapping[str, Any], processing_class: Any) -> list[Path]:
        """`qk_restored/` in a checkpoint that Trainer has just written, and `raw/` if it holds no weights; ALL ranks.

        `record` is what the manifest says of the training so far. Returns the restored folders.
        """
        raw = checkpoint
        # Trainer leaves no barrier behind a save, so this also waits until every writer has finished
        if not self.writers.all_find("waiting for the checkpoint", partial(holds_weights, checkpoint)):
            raw = checkpoint / "raw"
            export_model(self.model, raw, processing_class, self.staging)
        self._write_restored(raw, checkpoint / RESTORED, record)
        return [checkpoint / RESTORED]

    def write_final(
        self, final: Path, checkpoint: Path | None, record: Mapping[str, Any], processing_class: Any
    ) -> list[Path]:
        """`raw` (linked from `checkpoint` if that holds the weights, else live) and `qk_restored` in `final`; ALL."""
        raw = final / "raw"
        link = partial(_link, checkpoint, raw, self.staging)
        if not self.writers.all_find("linking the final checkpoint", link):
            export_model(self.model, raw, processing_class, self.staging)
        self._write_restored(raw, final / RESTORED, record)
        return [raw, final / RESTORED]

    def _write_restored(self, raw: Path, out: Path, record: Mapping[str, Any]) -> None:
        """The restored model of the raw files in `raw`; ALL ranks must call this.

        Ranks that share a disk each patch their part of the files; rank 0 publishes the folder when all are done.
        """
        what = f"writing {out}"
        if self.writers.each_node:  # every node has its own disk and its own copy of the raw files
            self.writers.run(what, partial(self._write_alone, raw, out, record))
            return

        begun: list[tuple[FolderPlan, Staging]] = []  # on rank 0

        def begin() -> Path:
            plan = self._plan_restored(raw, out)
            begun.append((plan, prepare(plan)))
            return begun[0][1].folder

        folder = ranks.on_rank_zero(what, begin)

        def write_share() -> list[Record]:
            if ranks.rank() >= world:
                return []
            plan = begun[0][0] if begun else self._plan_restored(raw, out)
            return write_files(plan, folder, ranks.rank(), world)

        def finish(records: list[Record]) -> None:
            publish(*begun[0], records, record)

        with begun[0][1] if begun else nullcontext():  # what is not published is removed
            world = ranks.world_size() if self._disk_is_shared(folder.parent) else 1
            mine = ranks.agree(what, write_share)
            shares: list[list[Record]] = [ranks.on_rank(rank, what, partial(list, mine)) for rank in range(world)]
            ranks.held_by(0, what, partial(finish, [file for share in shares for file in share]))

    def _write_alone(self, raw: Path, out: Path, record: Mapping[str, Any]) -> None:
        write_folder(self._plan_restored(raw, out), record)

    def _plan_restored(self, raw: Path, out: Path) -> FolderPlan:
        """What restoring changes in the files of `raw`; reads their headers, the same on every rank."""
        weights = open_weights(raw)
        maps = [pmap for _, pmaps in self.selection for pmap in pmaps]
        if get_method(self.config.method).needs_gains(vars(self.config)):
            maps += unselected_norms(self.selection)
        return plan_restored(
            weights,
            out,
            self.selection,
            disk_names(maps, weights.shapes(), self.model),
            ReferenceFile(self.folder),
            method=self.config.method,
            options=self.config.method_options,
            rows=self.config.rows,
            staging=self.staging,
            overwrite=True,
        )

    def _disk_is_shared(self, temporary: Path) -> bool:
        """Whether every rank sees what rank 0 writes to the run folder, with the reference, and to a temporary folder;
        asked once for each place of temporary folders. ALL ranks must call this.
        """
        place = temporary.parent
        if place not in self._shared:
            self._shared[place] = disk_is_shared(self.folder, temporary)
        return self._shared[place]


def _link(checkpoint: Path | None, raw: Path, staging: Path | None) -> bool:
    """Link a checkpoint's weights, Trainer's own or those we gathered, to `raw`; False if it has none."""
    for source in (checkpoint, checkpoint / "raw") if checkpoint else ():
        if holds_weights(source):
            link_checkpoint(source, raw, staging)
            return True
    return False


def _layer_count(model: Any) -> int | None:
    return getattr(model.config, "num_hidden_layers", None)
