"""Training of LoRA adapters as the guard sees it: drift of the effective weights, adapters without queries and keys.

The base's queries and keys never move, so there is no reference to keep. `full_weights.FullWeights` is the same for
full-parameter training; `session.Session` works with either.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkguard.adapters.drift import AdapterDriftMonitor
from qkguard.adapters.files import ADAPTER_TENSORS
from qkguard.adapters.live import adapted_weights
from qkguard.adapters.restored import (
    assemble_restored_adapter,
    copy_adapter,
    export_adapter,
    no_restored_form,
    prepare_adapter,
)
from qkguard.adapters.scaled import scaled_adapters
from qkguard.checkpoint.shares import Heed
from qkguard.checkpoint.staging import Staging
from qkguard.choice.candidates import Candidate, final_candidates, method_candidate
from qkguard.distributed import ranks
from qkguard.errors import QKGuardError
from qkguard.layout.selection import Selection, select, show_layers
from qkguard.offline.merge import merge_adapter, mergeable_weights
from qkguard.training.background import BackgroundWriter, Save, Write
from qkguard.training.loader_check import loaded_from
from qkguard.training.run_folder import RESTORED
from qkguard.training.writers import Writers

if TYPE_CHECKING:
    from qkguard.training.config import QKGuardConfig

logger = logging.getLogger(__name__)

MERGED_RESTORED = f"merged_{RESTORED}"

INSTEAD = (
    "Use restore or interpolate with alpha alone, or merge with `qkguard merge --keep-qk` and restore the merged "
    "model."
)


class AdapterWeights:
    """Queries and keys that LoRA adapters move.

    Attributes:
        drift_monitor: measures drift of the effective weights; None if no adapter is on queries or keys.
        usual: the restore of checkpoints, as configured.
        share: how much of the adapters' effect on queries and keys stays in it.
        selection, rows: what is restored: all that is guarded, or fewer layers (`restrict`).
        swap: opens a context in which adapters move queries and keys only by the share that stays; None where no such
            context is possible.
        staging: where folders are assembled (`FolderPlan`); set when a `train()` begins.

    Raises:
        QKGuardError: on all ranks, for PEFT methods other than LoRA, rsLoRA and DoRA, for settings that need full
            weights, and for queries and keys that are trained in another way than by adapters.
    """

    def __init__(
        self,
        config: QKGuardConfig,
        model: Any,
        folder: Path,
        writers: Writers,
        selection: Selection,
        background: BackgroundWriter,
    ) -> None:
        _check_settings(config)
        self.background = background
        self.config, self.model, self.folder, self.writers, self.selection = config, model, folder, writers, selection
        self.rows = config.rows
        self.staging: Path | None = None
        self.usual = method_candidate(config.restore_method, _options(config))
        self.share = _share(self.usual)
        self.weights = adapted_weights(model, selection, merging=config.merge_at_end)
        self.adapted = [weight for weight in self.weights if weight.layer is not None]
        self._restorable = self.weights
        self.writable = bool(self.adapted) and self._check_writable()
        self._loaded_from: str | None = None
        if config.merge_at_end:
            if not config.base_model:
                self._loaded_from = loaded_from(model)
            ranks.on_rank_zero("looking at the base to merge onto", self._check_merge_base)
        self.drift_monitor = AdapterDriftMonitor(model, selection, self.weights) if self.adapted else None
        scalable = not (self.share and self._has_dora())
        self.swap = partial(self.swapped, self.usual) if self.adapted and scalable else None

    def _has_dora(self) -> bool:
        return any(weight.dora for weight in self.weights)

    @property
    def restored_folder(self) -> str | None:
        """The restored model's folder in `final`; None where there is none."""
        if self.writable:
            return RESTORED
        return MERGED_RESTORED if self.adapted and self.config.merge_at_end else None

    def candidates(self) -> list[Candidate]:
        """The restores that the verdict measures: whole and, but for DoRA, half."""
        if self.swap is None:
            return []
        return final_candidates(self.usual, ("qk-pro", "interpolate") if self._has_dora() else ("qk-pro",))

    def restrict(self, layers: Sequence[int]) -> str:
        """Restore these of the guarded layers alone from now on; the drift stays that of all.

        Every rank by itself. Returns why it cannot be, in a clause; "" where it is done.
        """
        rows = replace(self.rows, layers=tuple(layers))
        selection = select([spec for spec, _ in self.selection], rows)
        names = {pmap.name for _, pmaps in selection for pmap in pmaps}
        restorable = [weight for weight in self.weights if weight.pmap.name in names]
        if self.adapted and not any(weight.layer is not None for weight in restorable):
            return f"no adapter is on the queries and keys of layers {show_layers(layers)}, which hold retrieval heads"
        self.selection, self.rows, self._restorable = selection, rows, restorable
        return ""

    def swapped(self, candidate: Candidate) -> AbstractContextManager[None]:
        """A context in which adapters move queries and keys as after a restore."""
        return scaled_adapters(self._restorable, _share(candidate))

    def _check_writable(self) -> bool:
        """Whether the adapters have a form without queries and keys; without one, only merges are written."""
        stuck = [
            weight.pmap.name
            for weight in self.adapted
            if weight.layer.lora_variant and (self.share or not weight.pmap.whole)
        ]
        if not stuck:
            return True
        why, merging = no_restored_form(stuck[0], self.share).rstrip("."), self.config.merge_at_end
        if self.config.strict and not merging:
            raise QKGuardError(f"{why}. With strict=True set merge_at_end=True, or train plain LoRA.")
        if ranks.rank() == 0:
            way_out = "" if merging else " Set merge_at_end=True to write merged models when training ends."
            logger.warning("%s. No restored adapters will be written.%s", why, way_out)
        return False

    def _check_merge_base(self) -> None:
        mergeable_weights(self._merge_base())

    def _merge_base(self) -> str:
        """What adapters are merged onto: a folder or hub id.

        Raises:
            QKGuardError: not one active adapter, or no name for the base.
        """
        active = list(self.model.active_adapters)
        if len(active) != 1:
            raise QKGuardError(
                f"With merge_at_end one adapter is merged, but {active} are active. Merge them with `qkguard merge`."
            )
        base = self.config.base_model or self._loaded_from or self.model.peft_config[active[0]].base_model_name_or_path
        if not base:
            raise QKGuardError("Nothing names the base model, which merge_at_end merges onto. Set base_model to it.")
        return str(base)

    @property
    def restored_place(self) -> str | None:
        """Where restored adapters appear in a checkpoint; None where there are none."""
        return f"{RESTORED}/<adapter>" if self.writable else None

    def merges(self) -> str:
        """What is merged at the end, in words."""
        return f"models merged onto {self._merge_base()} when training ends" if self.config.merge_at_end else ""

    def describe(self, seconds: float) -> list[str]:
        """Lines for the log: which adapters move queries and keys; `seconds` are those of setting it up."""
        names = ", ".join(self.model.peft_config)
        layers = show_layers(spec.layer for spec, _ in self.selection)
        if not self.adapted:
            return [
                f"Layers: adapters {names}, none on the queries and keys of the softmax-attention layers ({layers}), "
                "so these cannot drift, and nothing is restored."
            ]
        adapted = {weight.pmap.name for weight in self.adapted}
        on = show_layers(spec.layer for spec, maps in self.selection if adapted & {pmap.name for pmap in maps})
        of_all = "" if on == layers else f" (of {layers})"
        dora = " (DoRA)" if self._has_dora() else ""
        base = ", on the dequantised base" if self._is_quantised() else ""
        lines = [
            f"Layers: adapters {names}{dora} on {len(adapted)} of {len(self.weights)} query and key weights, in "
            f"softmax-attention layers {on}{of_all}.",
            f"Reference: the frozen base; drift is that of the effective weights{base} (set up in {seconds:.1f} s).",
        ]
        if not self.writable:
            lines.append("Restored adapters: none, because DoRA has no such form here.")
        return lines

    def _is_quantised(self) -> bool:
        return any(weight.quantised for weight in self.weights)

    def write_checkpoint(self, folder: Path, save: Save, processing_class: Any) -> list[Path]:
        """Begin `qk_restored/<adapter>/` in a folder that Trainer has just written; ALL ranks must call this.

        A level deeper than a full model's: a resumed Trainer loads every direct subfolder that holds an adapter.
        Returns the restored folders, which `background.finish` waits for.
        """
        pairs: list[tuple[Path, Path]] = []
        for name in self.model.peft_config if self.writable else ():
            raw = _saved_at(folder, name)
            # Trainer leaves no barrier behind a save, so this also waits until every writer has finished
            if not self.writers.all_find("waiting for the checkpoint", (raw / ADAPTER_TENSORS).is_file):
                raw = folder / "raw" / name
                export_adapter(self.model, name, raw, processing_class, self.staging)
            pairs.append((raw, folder / RESTORED / name))
        return self._begin_restored(pairs, save)

    def write_final(self, final: Path, checkpoint: Path | None, save: Save, processing_class: Any) -> list[Path]:
        """`raw/<adapter>` and `qk_restored/<adapter>` in `final`, and with `merge_at_end` merged models; ALL ranks."""
        pairs = [(final / "raw" / name, final / RESTORED / name) for name in self.model.peft_config]
        for raw, _ in pairs:
            self._write_raw(raw.name, checkpoint, raw, processing_class)
        written = [raw for raw, _ in pairs]
        if self.writable:
            written += self._begin_restored(pairs, save)
            self.background.finish(strict=True)
        if self.config.merge_at_end:
            written += self._merge(final, save.record, save.chosen or self.usual)
        return written

    def _write_raw(self, name: str, checkpoint: Path | None, raw: Path, processing_class: Any) -> None:
        """An adapter as trained: the checkpoint's, linked, or the live one; ALL ranks must call this."""
        places = (_saved_at(checkpoint, name), checkpoint / "raw" / name) if checkpoint else ()
        saved = [place for place in places if (place / ADAPTER_TENSORS).is_file()]
        if ranks.on_rank_zero("looking for the final adapter", partial(bool, saved)):

            def copy() -> None:
                copy_adapter(saved[0], raw, self.staging)

            self.writers.run(f"copying {raw}", copy)
        else:
            export_adapter(self.model, name, raw, processing_class, self.staging)

    def _begin_restored(self, pairs: Sequence[tuple[Path, Path]], save: Save) -> list[Path]:
        """Begin the adapters without queries and keys, given (raw, target) folders; ALL ranks must call this."""
        outs = [out for _, out in pairs]
        if not pairs:
            return outs
        about = f"writing {', '.join(map(str, outs))}"
        stagings: list[Staging] = []

        def prepare() -> None:
            stagings.extend(prepare_adapter(out, self.staging, overwrite=True) for out in outs)

        try:
            self.writers.run(about, prepare)
        except BaseException:
            _discard(stagings)
            raise
        files = tuple(raw / ADAPTER_TENSORS for raw, _ in pairs)
        make = partial(self._assemble, [raw for raw, _ in pairs], stagings, save)
        self.background.begin(about, Write(tuple(outs), files, make, save) if stagings else None)
        return outs

    def _assemble(
        self, raws: Sequence[Path], stagings: Sequence[Staging], save: Save, heed: Heed
    ) -> Sequence[Staging]:
        """All but the rename, in a thread."""
        chosen = save.chosen or self.usual
        is_raw = not chosen.tensors
        method = {"name": "raw" if is_raw else chosen.method, **self.rows.to_json()}
        selection, share = ((), 1.0) if is_raw else (self.selection, _share(chosen))
        try:
            for raw, made in zip(raws, stagings, strict=True):
                heed()
                assemble_restored_adapter(raw, made, selection, share=share, method=method, extra=save.record)
        except BaseException:
            _discard(stagings)
            raise
        return stagings

    def _merge(self, final: Path, record: Mapping[str, Any], chosen: Candidate) -> list[Path]:
        """`merged_raw` and, where adapters move queries and keys, `merged_qk_restored` in `final`; ALL ranks."""
        (adapter,) = self.model.active_adapters
        extra = {"trained_drift" if key == "drift" else key: value for key, value in record.items()}
        if self._is_quantised():
            quantised = "The adapter was trained on a quantised base and merged onto the unquantised weights."
            extra["warnings"] = [*extra.get("warnings", ()), quantised]
        settings = {"overwrite": True, "spec": self.config.spec, "extra": extra, **self.rows.to_json()}
        merge = partial(merge_adapter, self._merge_base(), final / "raw" / adapter, **settings)
        whole, restored = final / "merged_raw", final / MERGED_RESTORED
        self.writers.run(f"merging into {whole}", partial(merge, whole, keep_qk=True))
        if not self.adapted or not chosen.tensors:
            return [whole]
        self.writers.run(f"merging into {restored}", partial(merge, restored, alpha=1 - _share(chosen)))
        return [whole, restored]


def _options(config: QKGuardConfig) -> dict[str, Any]:
    return {**config.method_options, "projections": config.rows.projections}


def _share(candidate: Candidate) -> float:
    """How much of the adapters' effect on queries and keys a restore leaves."""
    return 1.0 - candidate.options["alpha"] if candidate.method == "interpolate" else 0.0


def _check_settings(config: QKGuardConfig) -> None:
    if config.restore_method not in ("restore", "interpolate"):
        raise QKGuardError(f"Method {config.method!r} works on full weights, not on adapters. {INSTEAD}")
    if config.align or config.per_layer:
        raise QKGuardError(f"The settings align and per_layer work on full weights, not on adapters. {INSTEAD}")


def _discard(stagings: Sequence[Staging]) -> None:
    for made in stagings:
        made.discard()


def _saved_at(checkpoint: Path, name: str) -> Path:
    """Where PEFT saves an adapter in a checkpoint."""
    return checkpoint if name == "default" else checkpoint / name
