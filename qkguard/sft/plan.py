"""`--dry-run`: what a training would do, computed from configs and a sample of the rows alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from qkguard.checkpoint.manifest import MANIFEST
from qkguard.checkpoint.reference_file import REFERENCE
from qkguard.errors import QKGuardError, first_line
from qkguard.layout.architecture import build_meta, find_architecture, plain_torch
from qkguard.layout.layers import layer_types
from qkguard.layout.selection import show_layers
from qkguard.probe.samples import SampleKey
from qkguard.probe.samples import plan as samples_of
from qkguard.probe.settings import lengths_left_out
from qkguard.probe.thinning import thin
from qkguard.report.numbers import human_bytes, number
from qkguard.report.run import METRICS
from qkguard.sft.arguments import Settings
from qkguard.sft.preflight import Preflight
from qkguard.training.config import QKGuardConfig
from qkguard.training.probe_plan import CHECKPOINTED_SHARE, FORWARD_SHARE, make_plan
from qkguard.training.run_folder import RESTORED, run_folder
from qkguard.training.schedules import interval, pace

SHARED = {  # what the processes of an arrangement divide among them; each holds all of the rest
    "zero1": {"optimizer"},
    "zero2": {"gradients", "optimizer"},
    "zero3": {"weights", "gradients", "optimizer"},
    "fsdp2": {"weights", "gradients", "optimizer"},
}


def plan(settings: Settings, found: Preflight, *, accelerate: str | None, processes: int) -> dict[str, Any]:
    """The plan as JSON values, with all that `describe` says."""
    training, guard = settings.training, settings.guard
    total, trained = parameters(settings, found)
    steps = max_steps(settings, found, processes)
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    lengths: list[Any] = [*found.lengths] or [None]
    return {
        "model": {
            "name": settings.model_name,
            "type": found.config.model_type,
            "layer_kinds": dict(Counter(layer_types(found.config) or [spec.kind for spec in found.specs])),
            "parameters": total,
            "trained": trained,
            "adapter": settings.model.use_peft,
        },
        "data": {
            "sources": [source.path for source in settings.data.sources()],
            "rows": found.sampled.total,
            "form": found.sampled.form,
            "looked_at": len(found.sampled.rows),
            "tokens": {"median": lengths[len(lengths) // 2], "longest": lengths[-1]},
            "max_length": training.max_length,
            "packing": bool(training.packing),
            "batch": batch,
            "steps": steps,
        },
        "guard": _reference(settings, found)
        | {key: getattr(guard, key) for key in ("method", "drift_steps", "routing_drift_steps")},
        "probes": _probes(settings, found, steps, batch),
        "files": _files(settings),
        "memory": memory(settings, found.config, total, trained, accelerate or "single", processes),
        "processes": processes,
        "warnings": found.warnings,
    }


def describe(plan: dict[str, Any]) -> str:
    """The plan as text, one subject a line."""
    environment = Environment(loader=PackageLoader("qkguard.sft"), undefined=StrictUndefined)
    environment.filters |= {"bytes": human_bytes, "layers": show_layers, "number": number, "pace": pace}
    return environment.get_template("plan.txt").render(plan)


def parameters(settings: Settings, found: Preflight) -> tuple[int | None, int | None]:
    """(parameters of the model, trained ones): counted on a copy without weights; None for models known by rule.

    Raises:
        QKGuardError: the adapter's target modules are not in the model.
    """
    architecture = find_architecture(found.config, trust_remote_code=settings.trusts_remote_code)
    if architecture.model_class is None:
        return None, None
    with plain_torch():
        model: Any = build_meta(architecture)
        total = sum(p.numel() for p in model.parameters())
        if not settings.model.use_peft:
            return total, total
        from peft import get_peft_model
        from trl import get_peft_config

        adapter: Any = get_peft_config(settings.model)
        try:
            with torch.device("meta"):
                adapted = get_peft_model(model, adapter)
        except ValueError as error:
            raise QKGuardError(f"The adapter does not fit {settings.model_name}: {first_line(error)}") from error
        return total, sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def held_dtype(settings: Settings, config: Any) -> torch.dtype:
    """The dtype the weights, and so the reference, are held in."""
    name = settings.model.dtype
    if name in (None, "auto"):
        name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return getattr(torch, name)


def _reference(settings: Settings, found: Preflight) -> dict[str, Any]:
    """The rows that are guarded; beside adapters the frozen base is their reference."""
    kept = {pmap.name: pmap.numel for _, maps in found.selection for pmap in maps}
    elements = sum(kept.values())
    return {
        "layers": [spec.layer for spec, _ in found.selection],
        "parameters": len(kept),
        "elements": elements,
        "reference_bytes": 0 if settings.model.use_peft else elements * held_dtype(settings, found.config).itemsize,
    }


def tokens_per_row(settings: Settings, found: Preflight) -> float | None:
    """Mean tokens of a row as it is trained on: cut at max_length; None where nothing is known."""
    limit = settings.training.max_length
    if not found.lengths:
        return float(limit) if limit else None
    return sum(min(n, limit) if limit else n for n in found.lengths) / len(found.lengths)


def max_steps(settings: Settings, found: Preflight, processes: int) -> int | None:
    """Optimizer steps; with packing from the mean length of the rows looked at."""
    training, rows = settings.training, found.sampled.total
    if training.max_steps > 0:
        return training.max_steps
    if rows is None:
        return None
    mean = tokens_per_row(settings, found)
    if training.packing and training.max_length and mean:
        rows = math.ceil(rows * mean / training.max_length)
    batches = math.ceil(math.ceil(rows / processes) / training.per_device_train_batch_size)
    return max(1, math.ceil(batches / training.gradient_accumulation_steps * training.num_train_epochs))


def _probes(settings: Settings, found: Preflight, steps: int | None, batch: int) -> dict[str, Any]:
    """When and on what; the cost in tokens read, against the tokens trained on."""
    guard, training, lengths = settings.guard, settings.training, found.probe_lengths
    if guard.probe_steps == 0:
        return {"off": "probe_steps is 0"}
    if not lengths:
        return {"off": f"{lengths_left_out(found.config, training.max_length)}; set qkguard.probe_lengths"}
    per_length = len(guard.probe_tasks) * guard.probe_depths * guard.probe_samples
    tokens = sum(lengths) * per_length
    every = interval(guard.probe_steps, training.eval_strategy != "no", steps) if steps else None
    share = within = asked = None
    per_row = tokens_per_row(settings, found)
    if steps and per_row:
        if training.packing and training.max_length:
            per_row = float(training.max_length)
        forward = CHECKPOINTED_SHARE if training.gradient_checkpointing else FORWARD_SHARE
        share = tokens * forward / (steps * batch * per_row)
        ends = 3 if guard.probe_restored else 2  # before the first step, and at the end raw (and restored)
        within = max(0, int(guard.probe_budget / share) - ends) if guard.probe_budget else None
        asked = _asked(guard, lengths, ends, steps * batch * per_row / forward)
    return {
        "off": None,
        "tasks": list(guard.probe_tasks),
        "lengths": lengths,
        "samples": len(lengths) * per_length,
        "tokens": tokens,
        "every": every,
        "schedule": guard.probe_steps,
        "count": (steps - 1) // every if every and steps else None,
        "share_of_training": share,
        "budget": guard.probe_budget,
        "within_budget": within,
        "asked": asked,
        "restored_too": guard.probe_restored,
    }


def _asked(guard: QKGuardConfig, lengths: list[int], passes: int, trained: float) -> int | None:
    """How many samples of the probes before and after training fit their budget; `trained` is the training's
    arithmetic, in tokens of a forward pass.
    """
    keys = samples_of(guard.probe_tasks, lengths, guard.probe_depths, guard.probe_samples)
    if guard.probe_budget is None:
        return len(keys)

    def tokens(keys: Sequence[SampleKey]) -> float:
        return float(sum(key.length for key in keys))

    found = make_plan(
        keys, tokens, passes=passes, at_least=passes, training=trained, share=guard.probe_budget, spent=0.0
    )
    return len(thin(keys, found.size))


def _files(settings: Settings) -> dict[str, str | None]:
    out, guard = settings.output_dir, settings.guard
    folder = run_folder(guard, settings.training)
    final = guard.final_export and guard.restore_on != "never"
    adapter = "/<adapter_name>" if settings.model.use_peft else ""
    return {
        "raw": str(out / "checkpoint-N"),
        "restored": str(out / "checkpoint-N" / RESTORED) + adapter if guard.restore_on in ("save", "best") else None,
        "manifest": MANIFEST,
        "reference": str(folder / REFERENCE),
        "metrics": str(folder / METRICS),
        "final": str(folder / "final") if final else None,
    }


def memory(
    settings: Settings, config: Any, total: int | None, trained: int | None, accelerate: str, processes: int
) -> dict[str, Any] | None:
    """Bytes per process of weights, gradients and optimizer; activations come on top.

    Frozen parameters take their dtype's bytes, trained ones 16: in bfloat16 under DeepSpeed 2 (weights) + 2
    (gradients) + 12 (float32 master copy, Adam's moments); in float32 4 + 4 + 8. What an arrangement divides among the
    processes is in SHARED. Plain bfloat16 without DeepSpeed or FSDP2 has no master copy: 2 + 2 + 4.
    """
    if total is None or trained is None:
        return None
    itemsize = held_dtype(settings, config).itemsize
    name, adapter = Path(accelerate).stem, settings.model.use_peft
    if name.startswith("zero"):
        weight = itemsize if settings.training.fp16 or not settings.training.bf16 else 2
        gradient, states = weight, 12 if weight == 2 else 8
    elif name == "fsdp2" or adapter:  # float32 trained parameters, with mixed precision
        weight, gradient, states = 4, 4, 8
    else:
        weight, gradient, states = itemsize, itemsize, 2 * itemsize
    frozen = total if adapter else 0
    whole = {
        "weights": frozen * itemsize + trained * weight,
        "gradients": trained * gradient,
        "optimizer": trained * states,
    }
    shared = SHARED.get(name, set())
    held = {part: size / processes if part in shared else size for part, size in whole.items()}
    return {
        **{part: int(size) for part, size in held.items()},
        "per_process": int(sum(held.values())),
        "per_trained_parameter": weight + gradient + states,
        "arrangement": name,
    }
