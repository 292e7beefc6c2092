"""Full-parameter training as the guard sees it: drift from a reference, and restored models beside the raw ones.

`adapter_weights.AdapterWeights` is the same for adapters; `session.Session` works with either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qkguard.checkpoint.reference_file import REFERENCE, ReferenceFile
from qkguard.checkpoint.restored import plan_restored, plan_unrestored
from qkguard.checkpoint.reuse import link_together, records_of
from qkguard.checkpoint.shares import Heed, Shares, telling, write_share, write_together
from qkguard.checkpoint.staging import Staging
from qkguard.checkpoint.weights import open_weights
from qkguard.checkpoint.write import FolderPlan, Record, prepare
from qkguard.choice.candidates import Candidate, final_candidates, method_candidate
from qkguard.choice.swap import restored
from qkguard.distributed import ranks
from qkguard.distributed.reference import Reference
from qkguard.layout import disk_names
from qkguard.layout.selection import select, unselected_norms
from qkguard.report.numbers import human_bytes
from qkguard.restore.registry import get_method
from qkguard.training.background import BackgroundWriter, Save, Write
from qkguard.training.drift_monitor import DriftMonitor
from qkguard.training.export import export_model, holds_weights, link_checkpoint
from qkguard.training.run_folder import RESTORED
from qkguard.training.start_lines import layers_of, shown
from qkguard.training.writers import Writers, disk_is_shared

if TYPE_CHECKING:
    from qkguard.training.config import QKGuardConfig


@dataclass(frozen=True)
class _Prepared:
    """A restored folder about to be made; `records`, if there are any, say that `made` holds the same files."""

    plan: FolderPlan
    staging: Staging
    made: Path | None
    records: list[Record] | None

    @property
    def copied_files(self) -> int:
        """How many ranks have something to do."""
        return sum(file.is_copied for file in self.plan.files) if self.records is None else 1

    def make(self, world: int, record: Mapping[str, Any], heed: Heed) -> list[Staging]:
        """All but the rename, in a thread."""
        if self.records is not None and self.made is not None:
            link_together(self.made, self.plan, self.staging, self.records, record)
        else:
            write_together(self.plan, self.staging, world, record, heed)
        return [self.staging]


class FullWeights:
    """Queries and keys that are trained whole.

    Attributes:
        drift_monitor: measures drift from the reference.
        usual: the restore of checkpoints, as configured.
        selection, rows, restorable: what is restored, its rows from before SFT: all that is guarded, or fewer layers
            (`restrict`).
        restored_folder: the restored model's folder in `final`.
        writable: whether there is one at every save, as adapters may have none.
        staging: where folders are assembled (`FolderPlan`); set when a `train()` begins.
    """

    restored_folder = RESTORED
    writable = True

    def __init__(
        self,
        config: QKGuardConfig,
        model: nn.Module,
        folder: Path,
        writers: Writers,
        reference: Reference,
        origin: str,
        background: BackgroundWriter,
    ) -> None:
        self.config, self.model, self.folder, self.writers = config, model, folder, writers
        self.background = background
        self.reference, self.origin, self.selection = reference, origin, reference.selection
        self.rows = config.rows
        self.drift_monitor = DriftMonitor(reference)
        options = {**config.method_options, "projections": config.rows.projections}
        self.usual = method_candidate(config.restore_method, options)
        self.restorable = reference
        self.staging: Path | None = None
        self._shared: dict[Path, bool] = {}

    restored_place = RESTORED
    """Where restored models appear in a checkpoint."""

    def merges(self) -> str:
        """What is merged at the end, in words: nothing."""
        return ""

    def describe(self, seconds: float) -> list[str]:
        """Lines for the log: what is guarded, and what it is compared with; `seconds` are those of setting it up."""
        reference = self.reference
        maps = reference.maps.values()
        kept = sum(pmap.numel * reference.slices[pmap.name].element_size() for pmap in maps)
        here = "" if ranks.world_size() == 1 else f", {human_bytes(reference.nbytes)} of it on this rank"
        layers = layers_of([spec.layer for spec, _ in self.selection], _layer_count(self.model))
        return [
            f"Layers: the queries and keys of {layers}; {sum(pmap.numel for pmap in maps):,} elements, "
            f"{human_bytes(kept)} in CPU memory{here}.",
            f"Reference: {self.origin}; in {shown(self.folder / REFERENCE)} (set up in {seconds:.1f} s).",
        ]

    def candidates(self) -> list[Candidate]:
        """The restores that the verdict measures."""
        return final_candidates(self.usual)

    def restrict(self, layers: Sequence[int]) -> str:
        """Restore these of the guarded layers alone from now on; the reference and the drift stay those of all.

        Every rank by itself. Returns why it cannot be, in a clause; "" where it is done.
        """
        rows = replace(self.rows, layers=tuple(layers))
        selection = select([spec for spec, _ in self.selection], rows)
        self.restorable = self.reference.only(selection)
        self.selection, self.rows = selection, rows
        options = dict(self.usual.options)
        own = {
            layer: strength for layer, strength in (options.pop("per_layer", None) or {}).items() if layer in layers
        }
        self.usual = method_candidate(
            self.usual.method, {**options, "per_layer": own or None, "projections": rows.projections}
        )
        return ""

    def swap(self) -> AbstractContextManager[None]:
        """A context in which the live model has the queries and keys of `usual`; ALL ranks enter and leave it."""
        return self.swapped(self.usual)

    def swapped(self, candidate: Candidate) -> AbstractContextManager[None]:
        """A context in which the live model has the queries and keys of a restore; ALL ranks enter and leave it."""
        return restored(self.model, self.restorable, method=candidate.method, **candidate.options)

    def write_checkpoint(self, folder: Path, save: Save, processing_class: Any) -> list[Path]:
        """Begin `qk_restored/` in a folder that Trainer has just written, and write `raw/` if it holds no weights.

        ALL ranks must call this. Returns the restored folders, which `background.finish` waits for.
        """
        raw = folder
        # Trainer leaves no barrier behind a save, so this also waits until every writer has finished
        if not self.writers.all_find("waiting for the checkpoint", partial(holds_weights, folder)):
            raw = folder / "raw"
            export_model(self.model, raw, processing_class, self.staging)
        self._begin_restored(raw, folder / RESTORED, save)
        return [folder / RESTORED]

    def write_final(self, final: Path, checkpoint: Path | None, save: Save, processing_class: Any) -> list[Path]:
        """`raw` (linked from `checkpoint` if that holds the weights, else live) and `qk_restored` in `final`; ALL."""
        raw = final / "raw"
        link = partial(_link, checkpoint, raw, self.staging)
        if not self.writers.all_find("linking the final checkpoint", link):
            export_model(self.model, raw, processing_class, self.staging)
        self._begin_restored(raw, final / RESTORED, save, made=checkpoint / RESTORED if checkpoint else None)
        self.background.finish(strict=True)
        return [raw, final / RESTORED]

    def _begin_restored(self, raw: Path, out: Path, save: Save, made: Path | None = None) -> None:
        """Begin the restored model of the raw files in `raw`, which `made` may hold already; ALL ranks must call this.

        Ranks that share a disk each patch their part of the files. Where every node has its own disk and its own copy
        of the raw files, one rank of each node works alone.
        """
        about = f"writing {out}"
        prepared: list[_Prepared] = []  # where the files are looked at and the staging folder made

        def prepare_here() -> tuple[Path, int]:
            prepared.append(self._prepare(raw, out, made, save.chosen or self.usual))
            return prepared[0].staging.folder, prepared[0].copied_files

        try:
            if self.writers.each_node:
                self.writers.run(about, prepare_here)
                part = self._part(prepared[0], save, 1) if prepared else None
            else:
                folder, copied = ranks.on_rank_zero(about, prepare_here)
                shared = copied > 1 and self._disk_is_shared(folder.parent)
                world = min(ranks.world_size(), copied) if shared else 1
                if prepared:
                    part = self._part(prepared[0], save, world)
                else:
                    part = self._share(raw, out, save, folder, world) if ranks.rank() < world else None
        except BaseException:
            for one in prepared:
                one.staging.discard()
            raise
        self.background.begin(about, part)

    def _prepare(self, raw: Path, out: Path, made: Path | None, chosen: Candidate) -> _Prepared:
        plan = self._plan_restored(raw, out, chosen)
        records = records_of(made, plan) if made else None
        staging = prepare(plan)
        Shares(staging.folder).open()
        return _Prepared(plan, staging, made, records)

    def _part(self, prepared: _Prepared, save: Save, world: int) -> Write:
        """The part of the rank that prepared the folder, and has it renamed."""
        plan, temporary = prepared.plan, prepared.staging.temporary
        make = partial(prepared.make, world, save.record)
        return Write((plan.out,), _files_of(plan), make, save, shared=world > 1, temporary=temporary)

    def _share(self, raw: Path, out: Path, save: Save, folder: Path, world: int) -> Write:
        """The part of another rank. The ranks do not meet here, so that what fails is told through the disk."""
        shares, rank = Shares(folder), ranks.rank()
        try:
            plan = self._plan_restored(raw, out, save.chosen or self.usual)
            files, make = _files_of(plan), partial(_make_share, plan, shares, rank, world)
        except Exception as error:
            files, make = (), partial(_fail_share, error, shares, rank)
        return Write((out,), files, make, save, shared=True)

    def _plan_restored(self, raw: Path, out: Path, chosen: Candidate) -> FolderPlan:
        """What restoring changes in the files of `raw`; reads their headers, the same on every rank."""
        weights, base = open_weights(raw), ReferenceFile(self.folder)
        if not chosen.tensors:
            return plan_unrestored(weights, out, base, rows=self.rows, staging=self.staging, overwrite=True)
        maps = [pmap for _, pmaps in self.selection for pmap in pmaps]
        if get_method(chosen.method).needs_gains(chosen.options):
            maps += unselected_norms(self.selection)
        return plan_restored(
            weights,
            out,
            self.selection,
            disk_names(maps, weights.shapes(), self.model),
            base,
            method=chosen.method,
            options=chosen.options,
            rows=self.rows,
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


def _make_share(plan: FolderPlan, shares: Shares, rank: int, world: int, heed: Heed) -> list[Staging]:
    write_share(plan, shares, rank, world, heed)
    return []


def _fail_share(error: Exception, shares: Shares, rank: int, heed: Heed) -> list[Staging]:
    with telling(shares, rank):
        raise error


def _link(checkpoint: Path | None, raw: Path, staging: Path | None) -> bool:
    """Link a checkpoint's weights, Trainer's own or those we gathered, to `raw`; False if it has none."""
    for source in (checkpoint, checkpoint / "raw") if checkpoint else ():
        if holds_weights(source):
            link_checkpoint(source, raw, staging)
            return True
    return False


def _files_of(plan: FolderPlan) -> tuple[Path, ...]:
    return tuple(plan.weights.folder / name for name in plan.weights.files)


def _layer_count(model: Any) -> int | None:
    return getattr(model.config, "num_hidden_layers", None)
