"""A guarded training of adapters: the base's queries and keys never move, so there is no reference to keep."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments

from qkguard.adapters.drift import AdapterDriftMonitor
from qkguard.adapters.files import ADAPTER_TENSORS
from qkguard.adapters.live import adapted_weights
from qkguard.adapters.restored import copy_adapter, export_adapter, no_restored_form, write_restored_adapter
from qkguard.adapters.scaled import scaled_adapters
from qkguard.distributed import ranks
from qkguard.errors import QKGuardError
from qkguard.layout.selection import show_layers
from qkguard.offline.merge import merge_adapter, mergeable_weights
from qkguard.training.drift_monitor import Tracker
from qkguard.training.recall_monitor import Swap
from qkguard.training.session import RESTORED, Session

logger = logging.getLogger(__name__)


class AdapterSession(Session):
    """`Session` for a PEFT model: drift of the effective weights, adapters without queries and keys, merges.

    Raises:
        QKGuardError: on all ranks, for PEFT methods other than LoRA, rsLoRA and DoRA, and for queries and keys that
            are trained in another way than by adapters.
    """

    def _establish(self, state: TrainerState, writers: list[int]) -> Tracker:
        if self.config.method not in ("restore", "interpolate"):
            raise QKGuardError(
                f"method={self.config.method!r} works on full weights, not on adapters; use restore or interpolate, "
                "or merge with `qkguard merge --keep-qk` and restore the merged model"
            )
        if self.config.align or self.config.per_layer:
            raise QKGuardError(
                "align and per_layer work on full weights, not on adapters; interpolate with alpha alone, or merge "
                "with `qkguard merge --keep-qk` and restore the merged model"
            )
        self.share = 1.0 - (self.config.alpha if self.config.method == "interpolate" else 1.0)
        self.weights = adapted_weights(self.model, self.selection, merging=self.config.merge_at_end)
        self.guards = any(weight.layer is not None for weight in self.weights)
        self.writable = self._check_writable()
        self.quantised = any(weight.quantised for weight in self.weights)
        if self.config.merge_at_end:
            ranks.on_rank_zero(
                "looking at the base to merge onto", lambda: bool(mergeable_weights(self._merge_base()))
            )
        return AdapterDriftMonitor(self.model, self.selection, self.weights) if self.guards else _NoDrift()

    def _check_writable(self) -> bool:
        """Whether the adapters have a form without queries and keys; without one, only merges are written."""
        names = [
            w.pmap.name
            for w in self.weights
            if w.layer is not None and w.layer.lora_variant and (self.share or not w.pmap.whole)
        ]
        if not names:
            return True
        why = no_restored_form(names[0], self.share)
        if self.config.strict and not self.config.merge_at_end:
            raise QKGuardError(f"{why}. With strict=True set merge_at_end=True, or train plain LoRA")
        if ranks.rank() == 0:
            logger.warning(
                "%s. No restored adapters will be written%s",
                why,
                "" if self.config.merge_at_end else "; merge_at_end=True writes the merged models when training ends",
            )
        return False

    def restored_weights(self) -> Swap | None:
        if not self.guards or (self.share and any(weight.dora for weight in self.weights)):
            return None
        return lambda: scaled_adapters(self.weights, self.share)

    def measure(self, step: int, *, routing: bool) -> None:
        if self.guards:
            super().measure(step, routing=routing)

    def restore_checkpoint(self, checkpoint: Path, step: int, processing_class: Any) -> None:
        """`qk_restored/<adapter>/` in a checkpoint, a level deeper than where a resumed Trainer looks for adapters."""
        if not (self.guards and self.writable):
            return
        started = time.perf_counter()
        for name, raw in self._raw_adapters(checkpoint, processing_class).items():
            self._write_adapter(raw, checkpoint / RESTORED / name, step)
        self.publish({"qkguard/overhead/save_seconds": time.perf_counter() - started}, step)

    def final_export(self, state: TrainerState, args: TrainingArguments, processing_class: Any) -> None:
        """`final/raw/<adapter>`, `final/qk_restored/<adapter>`, and with `merge_at_end` the merged models."""
        started = time.perf_counter()
        final = self.folder / "final"
        best = args.load_best_model_at_end and state.best_model_checkpoint
        checkpoint = Path(best) if best else self.output_dir / f"checkpoint-{state.global_step}"
        for name in self.model.peft_config:
            places = (_place(checkpoint, name), checkpoint / "raw" / name)
            saved = next((place for place in places if (place / ADAPTER_TENSORS).is_file()), None)
            found = ranks.agree("looking for the final adapter", lambda saved=saved: saved is not None)  # type: ignore[misc]
            out = final / "raw" / name
            if found[0]:
                self._on_writers(f"copying {out}", lambda saved=saved, out=out: copy_adapter(saved, out))  # type: ignore[misc]
            else:
                export_adapter(self.model, name, out, processing_class)
            if self.guards and self.writable:
                self._write_adapter(out, final / RESTORED / name, state.global_step)
        if self.config.merge_at_end:
            self._merge(final, state.global_step)
        self.publish({"qkguard/overhead/save_seconds": time.perf_counter() - started}, state.global_step)
        if ranks.rank() == 0:
            logger.info("wrote %s (%.1f s)", final, time.perf_counter() - started)

    def _merge(self, final: Path, step: int) -> None:
        (adapter,) = self.model.active_adapters
        base = self._merge_base()
        options: dict[str, Any] = {"overwrite": True, "spec": self.config.spec, **self.config.rows.to_json()}
        options["extra"] = {"step": step, "trained_drift": self.drift, **self.probe_record()}
        if self.quantised:
            said = "the adapter was trained on a quantised base and merged onto the unquantised weights"
            options["extra"]["warnings"] = [said]
        for folder, chosen in (("merged_raw", {"keep_qk": True}), (f"merged_{RESTORED}", {"alpha": 1 - self.share})):
            if folder == "merged_raw" or self.guards:
                self._on_writers(
                    f"merging into {final / folder}",
                    lambda folder=folder, chosen=chosen: merge_adapter(  # type: ignore[misc]
                        base, final / "raw" / adapter, final / folder, **options, **chosen
                    ),
                )

    def _merge_base(self) -> str:
        """What adapters are merged onto: a folder or hub id.

        Raises:
            QKGuardError: not one active adapter, or no name for the base.
        """
        active = list(self.model.active_adapters)
        if len(active) != 1:
            raise QKGuardError(
                f"merge_at_end merges one adapter, {active} are active; merge them with `qkguard merge`"
            )
        named = self.model.peft_config[active[0]].base_model_name_or_path
        base = self.config.base_model or named or getattr(self.model.config, "_name_or_path", None)
        if not base:
            raise QKGuardError("merge_at_end: the base model's folder is unknown; name it with base_model=...")
        return str(base)

    def _raw_adapters(self, checkpoint: Path, processing_class: Any) -> dict[str, Path]:
        """Where each adapter of a checkpoint is, after every rank has finished writing it."""
        out = {}
        for name in self.model.peft_config:
            place = _place(checkpoint, name)
            held = ranks.agree(
                "waiting for the checkpoint",
                lambda place=place: (place / ADAPTER_TENSORS).is_file() if self.writes else True,  # type: ignore[misc]
            )
            if not all(held):
                place = checkpoint / "raw" / name
                export_adapter(self.model, name, place, processing_class)
            out[name] = place
        return out

    def _write_adapter(self, raw: Path, out: Path, step: int) -> None:
        def write() -> None:
            method = {"name": self.config.method, **self.config.rows.to_json()}
            extra = {"step": step, "drift": self.drift, **self.probe_record()}
            write_restored_adapter(
                raw,
                out,
                self.selection,
                share=self.share,
                staging=self.folder,
                overwrite=True,
                method=method,
                extra=extra,
            )

        self._on_writers(f"writing {out}", write)
        if ranks.rank() == 0:
            logger.info("wrote %s", out)

    def _on_writers(self, what: str, work: Callable[[], Any]) -> None:
        """`work` on every writer (one rank, or one per node), the others waiting."""

        def on_writers() -> None:
            if self.writes:
                work()

        ranks.agree(what, on_writers)

    def _describe(self, args: TrainingArguments, seconds: float) -> str:
        layers = show_layers(spec.layer for spec, _ in self.selection)
        adapted = [w.pmap.name for w in self.weights if w.layer is not None]
        names = ", ".join(self.model.peft_config)
        if not self.guards:
            return (
                f"PEFT model (adapters: {names}): no adapter is on the queries and keys of the softmax-attention "
                f"layers ({layers}), so these cannot drift; nothing is restored"
            )
        with_adapters = show_layers(s.layer for s, maps in self.selection if any(p.name in adapted for p in maps))
        dora = ", DoRA" if any(w.dora for w in self.weights) else ""
        config = self.config
        return (
            f"PEFT model (adapters: {names}{dora}): {len(adapted)} of {len(self.weights)} query and key weights carry "
            f"adapters, in softmax-attention layers {with_adapters} of {layers} "
            f"({seconds:.1f} s). The base's queries and keys are frozen, no reference is "
            "kept; drift is that of the effective weights. "
            + (
                f"Restored adapters ({config.method}): {self._when(f'checkpoint-N/{RESTORED}/<adapter>')}"
                if self.writable
                else "Restored adapters: none, DoRA has no such form here"
            )
            + (f", merged models at the end, onto {self._merge_base()}" if config.merge_at_end else "")
            + (
                " (the base in training is quantised, drift is that of its dequantised weights)."
                if self.quantised
                else "."
            )
        )


class _NoDrift:
    """For adapters that leave queries and keys alone."""

    def measure(self, model: nn.Module) -> dict[str, float]:
        return {}

    def measure_routing(self, model: nn.Module) -> tuple[dict[str, float], dict[str, list[float]]]:
        return {}, {}


def _place(checkpoint: Path, name: str) -> Path:
    """Where PEFT saves an adapter below a checkpoint."""
    return checkpoint if name == "default" else checkpoint / name
