"""One rank fails, or the guard's meetings are counted: what the others must not notice more than needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from qkguard import QKGuardCallback
from qkguard.checkpoint import reference_file
from qkguard.distributed import ranks
from qkguard.training import drift_monitor
from qkguard.training.side_stream import SideStream
from tests.distributed.cases import base_model, raises, rank, reset
from tests.distributed.probing_cases import lines_into
from tests.support.training import arguments, make_trainer, train


def out_of_memory(*args: Any, **options: Any) -> None:
    raise torch.OutOfMemoryError("out of memory")


@contextmanager
def failing_on(failing: int, owner: Any, name: str) -> Iterator[None]:
    """Inside the block a function fails on one rank alone."""
    with pytest.MonkeyPatch.context() as patch:
        if rank() == failing:
            patch.setattr(owner, name, out_of_memory)
        yield


def failing_measurement(folder: Path) -> None:
    """Drift that one rank cannot measure: one line a step, training and the final models as ever; `strict` ends it."""
    base = base_model(folder)
    last = dist.get_world_size() - 1
    places: dict[str, tuple[int, Any, str]] = {
        "sums": (last, drift_monitor.DriftMonitor, "_sums"),
        "routing": (0, drift_monitor, "layer_routing"),  # a rank that has a layer: there may be fewer than ranks
    }
    for label, (failing, *place) in places.items():
        lines: list[str] = []
        with failing_on(failing, *place):
            reset()
            lines_into(lines)
            train(base, arguments(folder / label), QKGuardCallback(routing_drift_steps=1))
            assert (folder / label / "run/_qkguard/final/qk_restored/qkguard.json").exists()
            reset()
            with raises(ranks.QKGuardError, f"measuring drift failed on rank {failing}: OutOfMemoryError"):
                train(base, arguments(folder / f"{label}-strict"), QKGuardCallback(routing_drift_steps=1, strict=True))
        if rank() == 0:
            told = [line for line in lines if "Measuring drift" in line]
            assert told and all(f"failed on rank {failing}: OutOfMemoryError" in line for line in told), lines
        dist.barrier()


def failing_reference(folder: Path) -> None:
    """A reference that cannot be written ends the run on all ranks: nothing could be restored from it."""
    base = base_model(folder)
    with failing_on(0, reference_file._ReferenceWriter, "finish"), raises(ranks.QKGuardError, "OutOfMemoryError"):
        train(base, arguments(folder), QKGuardCallback())


class Counting(TrainerCallback):
    """How often the ranks have agreed, at the beginning and the end of every step and save."""

    def __init__(self) -> None:
        self.counts: list[tuple[str, int]] = []

    def count(self, event: str) -> None:
        meetings = ranks._current
        self.counts.append((event, meetings.number if meetings is not None else 0))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.count("begin")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.count("step")

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.count("save")


def agreements(folder: Path) -> None:
    """The ranks agree once in a step whose drift is measured, never in others; as often for many layers as for few.

    Counted between callbacks that stand before and behind the guard.
    """
    seen = []
    for name, layers in (("llama", 2), ("llama", 4)):
        reset()
        base = base_model(folder / f"{layers}", name, num_hidden_layers=layers)
        before, behind = Counting(), Counting()
        args = arguments(folder / f"{layers}", logging_steps=2, max_steps=6, save_steps=2)
        trainer = make_trainer(base, args)
        for callback in (before, QKGuardCallback(routing_drift_steps=4, probe_steps=0), behind):
            trainer.add_callback(callback)
        trainer.train()
        spent = [(one[0], two[1] - one[1]) for one, two in zip(before.counts, behind.counts, strict=True)]
        seen.append(spent)
    assert seen[0] == seen[1], seen
    steps = [count for event, count in seen[0] if event == "step"]
    assert steps == [0, 2, 0, 1, 0, 1], steps  # before the first save the reference is waited for; at 4 with routing
    (start,) = [count for event, count in seen[0] if event == "begin"]
    saves = [count for event, count in seen[0] if event == "save"]
    assert (start, saves) == (7, [3, 4, 4]), (start, saves)


def agreements_beside(folder: Path) -> None:
    """Drift that is worked out beside the next step has its one agreement when that has ended."""
    reset()
    base = base_model(folder)
    before, behind = Counting(), Counting()
    trainer = make_trainer(base, arguments(folder, logging_steps=2, max_steps=8, save_steps=8))
    for callback in (before, QKGuardCallback(routing_drift_steps=6, probe_steps=0), behind):
        trainer.add_callback(callback)
    with pytest.MonkeyPatch.context() as patch:  # as on an accelerator
        patch.setattr(SideStream, "goes_beside", property(lambda side: side._steps_seen))
        trainer.train()
    spent = [two[1] - one[1] for one, two in zip(before.counts, behind.counts, strict=True) if one[0] == "step"]
    assert spent == [0, 0, 1, 0, 1, 1, 0, 2], spent  # at 6 with routing, at 8 before the save, which waits
