"""What is established before the first step: the pre-SFT reference, and what must stop or warn the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from qkguard.checkpoint.manifest import MANIFEST, versions
from qkguard.checkpoint.reference_file import ReferenceFile, compare_with_base, write_reference
from qkguard.checkpoint.weights import BaseFolder, identify, open_weights, resolve_folder
from qkguard.distributed import ranks, sharding
from qkguard.distributed.reference import Reference
from qkguard.errors import QKGuardError, WrongReferenceError
from qkguard.layout import ParamMap, disk_names
from qkguard.layout.selection import Selection
from qkguard.report.run import RUN_FOLDER

if TYPE_CHECKING:  # pydantic doubles the time that `from qkguard import QKGuardCallback` takes
    from qkguard.training.config import QKGuardConfig

logger = logging.getLogger(__name__)


def establish_reference(
    model: Any, selection: Selection, folder: Path, config: QKGuardConfig, *, resumed: bool, writers: list[int]
) -> tuple[Reference, str]:
    """The pre-SFT rows of this run, and one clause that says where they come from; a collective (ALL ranks).

    A resumed run's live weights have moved, so there the reference is read from the run folder (or `base_model`) and
    never retaken. At step 0 an existing reference is kept only if it is bit-equal to the live weights.

    Raises:
        QKGuardError: on all ranks, when the reference would be wrong or cannot be had.
    """
    maps = [pmap for _, pmaps in selection for pmap in pmaps]
    base = config.base_model if config.base_model != "live" else None
    source: Any
    if base is not None:
        source = ranks.held_by(0, f"opening base_model {base}", lambda: base_source(base, maps, model))
        reference = Reference.scatter(model, selection, source)
        _write(reference, folder, model, {"id": str(base), "checked": "read from base_model"}, writers)
        return reference, f"read from base_model {base}"

    if resumed:
        source = ranks.held_by(0, "reloading the reference", lambda: ReferenceFile(folder))
        reference = Reference.scatter(model, selection, source)
        return reference, "verified and reloaded, the run is resumed"

    ranks.on_rank_zero("checking the starting weights", lambda: refuse_guarded_checkpoint(model))
    if ranks.on_rank_zero("looking for the reference", lambda: ReferenceFile.exists(folder)):
        source = ranks.held_by(0, "opening the reference", lambda: ReferenceFile(folder))
        reference = Reference.scatter(model, selection, source)
        if changed := reference.changed(model):
            raise WrongReferenceError(
                f"{folder} holds the reference of another run: {len(changed)} of {len(maps)} parameters differ from "
                f"the weights training starts with, first {changed[0]}. Resume that run (resume_from_checkpoint), "
                f"choose another output_dir, name the pre-SFT checkpoint with base_model=..., or delete {folder}"
            )
        return reference, "found from an earlier start and bit-equal to the live weights"

    reference = Reference.take(model, selection)
    _write(
        reference, folder, model, {"id": str(getattr(model.config, "_name_or_path", "") or "live weights")}, writers
    )
    outcome = ranks.on_rank_zero(
        "comparing the reference with the base checkpoint", lambda: _check_base(model, folder, maps, config)
    )
    return reference, f"taken from the live weights, {outcome}"


def _write(reference: Reference, folder: Path, model: Any, base: dict[str, Any], writers: list[int]) -> None:
    about = {
        "base": base,
        "model_type": getattr(model.config, "model_type", None),
        "versions": versions(),
    }
    for writer in writers:
        write_reference(reference, folder, about, writer)


def base_source(base: str, maps: Sequence[ParamMap], model: Any) -> BaseFolder:
    """The rows of a base checkpoint's own files; QKGuardError where it does not fit the model."""
    folder = resolve_folder(base)
    weights = open_weights(folder)
    source = BaseFolder(weights, disk_names(maps, weights.shapes(), model), model_id=base)
    source.check(maps)
    return source


def _check_base(model: Any, folder: Path, maps: Sequence[ParamMap], config: QKGuardConfig) -> str:
    """Compare the reference just written with the base checkpoint's files, where they are local and comparable.

    A loader that leaves weights random without a word (seen with hybrids under ZeRO-3) must stop the run here.
    """
    if config.base_model == "live":
        return "not compared with any checkpoint (base_model: live)"
    name = getattr(model.config, "_name_or_path", None)
    local = _local_folder(name)
    if local is None:
        return "not compared with a checkpoint (none on this machine)"
    if getattr(model.config, "quantization_config", None) is not None or any(local.glob("*.gguf")):
        return "not compared with the base checkpoint (it is quantised)"
    try:
        source = base_source(str(local), maps, model)
    except QKGuardError as error:
        return f"not compared with the base checkpoint ({error})"
    reference = ReferenceFile(folder)
    if wrong := compare_with_base(reference, source, maps):
        raise WrongReferenceError(
            f"{len(wrong)} of {len(maps)} query/key parameters differ from their own checkpoint {local}, first "
            f"{wrong[0]}: the loader did not fill them, or they were changed after loading. Load them correctly; if "
            'the change is meant, save the model to a folder and load it from there, or set base_model="live"'
        )
    return f"equal to {identify(str(name), local)['id']}"


def _local_folder(name: str | None) -> Path | None:
    if not name:
        return None
    if os.path.isdir(name):
        return Path(name)
    try:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(name, "config.json")
        return Path(config).parent if isinstance(config, str) else None
    except (ValueError, OSError):
        return None


def refuse_guarded_checkpoint(model: Any) -> None:
    """Refuse a model loaded from inside a guarded run as pre-SFT: its queries and keys have been through SFT."""
    name = getattr(model.config, "_name_or_path", None)
    if not name or not os.path.isdir(name):
        return
    here = Path(name).resolve()
    own = (here / MANIFEST).is_file()
    run = next((p for p in (here, *list(here.parents)[:3]) if ReferenceFile.exists(p / RUN_FOLDER)), None)
    run = run or next((p for p in list(here.parents)[:3] if ReferenceFile.exists(p)), None)
    if own or run:
        where = f"the guarded run {run}" if run else "a checkpoint that qkguard wrote"
        raise QKGuardError(
            f"the model was loaded from {here}, inside {where}, so it is not the model before SFT. Continue that run "
            "with resume_from_checkpoint, or name what counts as pre-SFT: QKGuardConfig(base_model=...), which may be "
            "this very folder"
        )


def warnings_at_start(model: Any, args: TrainingArguments) -> list[str]:
    """Things the user wants to know before training, each one sentence with what to do."""
    out = []
    conversions = getattr(model, "_weight_conversions", None) or []
    unused = [c for c in conversions if hasattr(c, "was_used") and not c.was_used()]
    if unused and sharding.backend(model) == "zero3" and _renames_differ(model, unused):
        out.append(
            "Trainer will save this model under other tensor names than its base has, which may not load again: under "
            "ZeRO-3 transformers keeps weight conversions that loading never used, and reverses them on save. Repair "
            "it before train(): model._weight_conversions = [c for c in model._weight_conversions if c.was_used()]"
        )
    adapters = hasattr(model, "peft_config")  # these are saved whole either way
    if sharding.backend(model) == "zero3" and not adapters and not _gathers_on_save(args):
        out.append(
            "ZeRO-3 runs without stage3_gather_16bit_weights_on_model_save, so Trainer's checkpoints hold no loadable "
            "weights; qkguard writes them itself, gathered one parameter at a time, to checkpoint-N/raw"
        )
    return out


def _renames_differ(model: Any, unused: list[Any]) -> bool:
    """Whether saving with the unused conversions gives other names than without them."""
    from transformers.core_model_loading import revert_weight_conversion

    def names() -> set[str]:
        return set(
            revert_weight_conversion(model, {n: torch.empty(0, device="meta") for n, _ in model.named_parameters()})
        )

    kept = model._weight_conversions
    try:
        with_unused = names()
        model._weight_conversions = [c for c in kept if c not in unused] or None
        return with_unused != names()
    except Exception:  # a conversion that wants real shapes is more than a renaming
        return True
    finally:
        model._weight_conversions = kept


def _gathers_on_save(args: TrainingArguments) -> bool:
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None:
        plugin = getattr(args, "deepspeed_plugin", None)
        config = getattr(plugin, "hf_ds_config", None)
    value = config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save") if config else None
    return bool(value)


def retire_later_checkpoints(output_dir: Path, folder: Path, step: int) -> list[str]:
    """On resume at `step`, move restored folders of later steps aside: they belong to a branch that was left.

    The checkpoints' times stay as they are, because Trainer's rotation goes by them (rank 0).
    """
    moved = []
    for restored in sorted(output_dir.glob("checkpoint-*/qk_restored")):
        checkpoint = restored.parent
        number = checkpoint.name.removeprefix("checkpoint-")
        if number.isdigit() and int(number) > step:
            before = checkpoint.stat()
            aside = folder / "superseded"
            aside.mkdir(parents=True, exist_ok=True)
            target = aside / checkpoint.name
            while target.exists():
                target = target.with_name(target.name + "-older")
            os.rename(restored, target)
            os.utime(checkpoint, ns=(before.st_atime_ns, before.st_mtime_ns))
            moved.append(str(target))
    return moved
