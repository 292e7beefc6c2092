"""Kills guarded trainings in the middle of a background write, again and again in one run folder.

    python -m tests.support.kills FOLDER KILLS SEED

Every training is a fork of this process, which has imported everything. After each kill nothing that looks restored
may be half-written, and the next start must have cleared up before its first step. Prints how many kills hit. Nothing
is rotated: a kill in the middle of Trainer's own removal leaves half a checkpoint, with half of all that is in it.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments

from qkguard import QKGuardCallback, QKGuardError, verify
from qkguard.checkpoint import shares
from qkguard.checkpoint.weights import open_weights
from qkguard.checkpoint.write import write_files
from tests.support.models import tiny_model
from tests.support.training import OnlySaves, arguments, save_base, saved_in_shards, token_rows

SLOW = ("fsync", "rename", "link", "pwrite", "copy_file_range", "mkdir", "unlink")
PAUSE = 0.003
WINDOW = 0.4
"""Seconds after a write's beginning in which it is killed; on a fast machine it ends sooner, and the kill is void."""
GIVE_UP_SECONDS = 60
LEFT_OVER = 3


def temporary(run: Path) -> list[Path]:
    return list(run.rglob("_qkguard-tmp-*"))


def check(run: Path) -> None:
    """Everything under a final name is whole, and what is not is refused."""
    for restored in [*run.glob("checkpoint-*/qk_restored"), *run.glob("_qkguard/final/qk_restored")]:
        verify(restored, full=True)
    for half in [folder / "new" for folder in temporary(run) if (folder / "new").is_dir()]:
        try:
            open_weights(half)
        except QKGuardError:
            continue
        raise AssertionError(f"{half} loads")


def slow_down() -> None:
    """Every call that leaves a trace on the disk takes a moment, in the guard's thread and at its renames."""
    for name in SLOW:
        original = getattr(os, name)

        def slow(*args: Any, _original: Any = original, **options: Any) -> Any:
            if threading.current_thread().name.startswith("qkguard") or _original is os_rename:
                time.sleep(PAUSE)
            return _original(*args, **options)

        setattr(os, name, slow)


os_rename = os.rename


class Start(TrainerCallback):
    """The first step of a training that follows a kill: what that left is gone."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 and temporary(Path(args.output_dir)):
            os._exit(LEFT_OVER)


def train(folder: Path, model: Any, data: Any, begun: int) -> None:
    """A training that writes a byte to `begun` whenever one of its background writes begins."""

    def announced(*args: Any) -> Any:
        os.write(begun, b"w")
        return write_files(*args)

    shares.write_files = announced
    slow_down()
    args = arguments(folder, TrainingArguments, save_steps=1, max_steps=60, logging_steps=20)
    guard = QKGuardCallback(base_model="live", strict=True, probe_steps=0, drift_steps=0, routing_drift_steps=0)
    callbacks = [guard, OnlySaves(*range(1, 60, 3)), Start()]
    with saved_in_shards("40KB"):
        Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks).train()


def kill_one(folder: Path, model: Any, data: Any, chance: random.Random) -> bool:
    """Whether the kill came while a folder was in the making."""
    read, begun = os.pipe()
    child = os.fork()
    if child == 0:
        log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(read)
        try:
            train(folder, model, data, begun)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)
    os.close(begun)
    for _ in range(chance.randint(1, 3)):
        if not os.read(read, 1):
            break  # it ended by itself
    time.sleep(chance.uniform(0, WINDOW))
    os.kill(child, signal.SIGKILL)
    os.close(read)
    status = os.waitpid(child, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    assert code == -signal.SIGKILL, f"the training ended by itself ({code}): {(folder / 'log').read_text()[-2000:]}"
    check(folder / "run")
    return bool(temporary(folder / "run"))


def main(folder: Path, kills: int, seed: int) -> None:
    save_base(folder / "base", "llama")
    model, chance = tiny_model("llama"), random.Random(seed)
    data = token_rows().map(lambda row: {"input_ids": row["input_ids"][:12], "labels": row["input_ids"][:12]})
    hit = made = 0
    started = time.monotonic()
    while hit < kills:
        hit += kill_one(folder, model, data, chance)
        made += 1
        assert made <= 4 * kills, f"{hit} of {made} kills hit a write"
    print(f"{hit} of {made} kills in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
