"""Restored models made beside the training: nobody waits, nothing half-written, rotation, failures, kills, exits."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager

from qkguard import QKGuardCallback, QKGuardError, restore_checkpoint, verify
from qkguard.checkpoint import reuse, shares
from qkguard.checkpoint.manifest import reference_of
from qkguard.checkpoint.shares import ShareError, Shares
from qkguard.checkpoint.write import write_files
from qkguard.training import background
from qkguard.training.background import BackgroundWriter, Save, Write
from tests.support import judge, kills
from tests.support.training import OnlySaves, arguments, make_trainer, save_base, token_rows, train

GATE_SECONDS = 60


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """The guard's lines of a level so far."""
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    caplog.set_level(logging.INFO, logger="qkguard")

    def of_level(level: int) -> list[str]:
        records = [record for record in caplog.records if record.name.startswith("qkguard")]
        return [record.getMessage() for record in records if record.levelno == level]

    return of_level


class Gate:
    """A write that begins, and then waits until it may go on."""

    def __init__(self) -> None:
        self.open, self.begun, self.count = threading.Event(), threading.Event(), 0

    def __call__(self, plan: Any, folder: Path, rank: int, world: int, progress: Any) -> Any:
        self.count += 1
        self.begun.set()
        give_up = time.monotonic() + GATE_SECONDS
        while not self.may_open() and time.monotonic() < give_up:
            progress(0, 1)
            time.sleep(0.005)
        return write_files(plan, folder, rank, world, progress)

    def may_open(self) -> bool:
        return self.open.is_set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(shares, "write_files", gate)
    yield gate
    gate.open.set()


class AtStep(TrainerCallback):
    """Calls something at the end of steps, after the guard."""

    def __init__(self, **actions: Callable[[], None]) -> None:
        self.actions = {int(name.removeprefix("step_")): action for name, action in actions.items()}

    def on_step_end(self, args, state, control, **kwargs):
        self.actions.get(state.global_step, lambda: None)()


def guard(**options: Any) -> QKGuardCallback:
    return QKGuardCallback(**{"strict": True, "probe_steps": 0} | options)


def run_with(base: Path, folder: Path, callback: QKGuardCallback, *others: TrainerCallback, **options: Any) -> Any:
    trainer = make_trainer(base, arguments(folder, **options), callback)
    for other in others:
        trainer.add_callback(other)
    trainer.train()
    return trainer


def nothing_left(run: Path) -> bool:
    return not list(run.rglob("_qkguard-tmp-*"))


def is_done(guard: QKGuardCallback) -> bool:
    """Waits for the thread of the guard's write, as the trainer's next event would find it."""
    guard.session.background._write.wait()
    return True


def seconds(run: Path, kind: str) -> list[float]:
    key = f"qkguard/overhead/{kind}_seconds"
    return [row[key] for row in judge.metrics_rows(run) if key in row]


# -- nobody waits ---------------------------------------------------------------------------------------------------


def test_training_goes_on_beside_a_slow_write(base, tmp_path, gate):
    run, seen = tmp_path / "run", {}
    out = run / "checkpoint-1/qk_restored"
    callback = guard()

    def at_two() -> None:
        assert gate.begun.wait(GATE_SECONDS)
        seen[2] = out.exists()
        assert seconds(run, "save")
        time.sleep(sum(seconds(run, "save")))  # the write takes longer than the save did, however slow the machine
        gate.open.set()
        is_done(callback)
        seen["made"] = out.exists()

    look = AtStep(step_2=at_two, step_3=lambda: seen.update({3: out.exists()}))
    run_with(base, tmp_path, callback, OnlySaves(1), look, save_steps=1)
    assert seen == {2: False, "made": False, 3: True}, "in its place at the first event after it was made"
    assert seconds(run, "save_background")[0] > seconds(run, "save")[0]
    assert len(seconds(run, "save_background")) == 1 and len(seconds(run, "save")) == 2, "the end is waited for"
    judge.judge_restored("llama", base, run / "checkpoint-1", out, torch.float32)
    assert nothing_left(run)


def test_the_next_save_waits_for_the_one_before(base, tmp_path, gate):
    saved = tmp_path / "run/checkpoint-2/trainer_state.json"
    gate.may_open = lambda: gate.count > 1 or (saved.exists() and time.time() > saved.stat().st_mtime + 0.5)
    run_with(base, tmp_path, guard(final_export=False), save_steps=1, max_steps=2)
    waited = seconds(tmp_path / "run", "save")
    assert waited[1] > 0.3 and waited[1] > waited[0]
    for step in (1, 2):
        verify(tmp_path / f"run/checkpoint-{step}/qk_restored")


def test_folders_are_those_of_qkguard_restore(base, tmp_path):
    train(base, arguments(tmp_path, save_steps=1), guard())
    run = tmp_path / "run"
    for step in (2, 3):
        raw = run / f"checkpoint-{step}"
        wanted = restore_checkpoint(base, raw, tmp_path / f"by_hand-{step}")
        made = json.loads((raw / "qk_restored/qkguard.json").read_text())
        for key in ("files", "layers", "tensors", "companions", "nonfinite", "partial"):
            assert made[key] == wanted[key], key
        assert made["raw"]["files"] == wanted["raw"]["files"]
        assert judge.weight_hashes(raw / "qk_restored") == judge.weight_hashes(tmp_path / f"by_hand-{step}")
    hashes = [judge.weight_hashes(place) for place in (run / "checkpoint-2/qk_restored", tmp_path / "by_hand-3")]
    assert hashes[0] and hashes[0] != hashes[1], "another checkpoint's would pass"


def test_training_is_left_alone(base, tmp_path):
    outcomes = []
    for callback in (None, guard(method="qk-pro"), guard(restore_on="never")):
        folder = tmp_path / str(len(outcomes))
        threads = torch.get_num_threads()
        trainer = train(base, arguments(folder, save_steps=1, max_steps=4), callback)
        assert torch.get_num_threads() == threads
        bits = judge.weights_in_bits(folder / "run/checkpoint-4")
        outcomes.append((trainer.recorder.rows, bits, torch.get_rng_state().tolist()))
    assert len(outcomes[0][0]) == 4 and outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0][1] != judge.weights_in_bits(base)


def test_the_final_model_is_linked_not_made_again(base, tmp_path, gate):
    gate.open.set()
    train(base, arguments(tmp_path, max_steps=2, save_steps=2), guard())
    assert gate.count == 1
    checkpoint, final = tmp_path / "run/checkpoint-2/qk_restored", tmp_path / "run/_qkguard/final/qk_restored"
    assert (final / "model.safetensors").samefile(checkpoint / "model.safetensors")
    judge.judge_restored("llama", base, final.parent / "raw", final, torch.float32)
    manifests = [json.loads((folder / "qkguard.json").read_text()) for folder in (checkpoint, final)]
    assert reference_of(checkpoint) == reference_of(final) == tmp_path / "run/_qkguard/reference.safetensors"
    for manifest in manifests:
        manifest["base"].pop("reference")  # each seen from its own folder
    for key in ("files", "layers", "tensors", "method", "base", "step"):
        assert manifests[0][key] == manifests[1][key], key
    assert manifests[1]["raw"]["path"] == "../raw" and verify(final, full=True)["raw"] == "unchanged"


@pytest.mark.parametrize("damage", ["method", "base", "raw", "file", "manifest"])
def test_another_model_is_not_linked(base, tmp_path, damage):
    train(base, arguments(tmp_path, max_steps=2, save_steps=2), callback := guard(final_export=False))
    raw = tmp_path / "run/checkpoint-2"
    made = raw / "qk_restored"
    weights = callback.session.weights
    plan = weights._plan_restored(raw, tmp_path / "out", weights.usual)
    assert reuse.records_of(made, plan) is not None
    manifest = json.loads((made / "qkguard.json").read_text())
    if damage in ("method", "base"):
        manifest[damage]["name"] = "other"
        (made / "qkguard.json").write_text(json.dumps(manifest))
    elif damage == "manifest":
        (made / "qkguard.json").unlink()
    else:
        file = (raw if damage == "raw" else made) / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.unlink()
        file.write_bytes(data)
    assert reuse.records_of(made, plan) is None


# -- failures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shares, "write_files", full)


def test_a_failure_ends_that_write_alone_with_one_line(base, tmp_path, lines, monkeypatch):
    failed = []

    def full_once(*args: Any) -> Any:
        if not failed:
            failed.append(True)
            raise OSError(28, "No space left on device")
        return write_files(*args)

    monkeypatch.setattr(shares, "write_files", full_once)
    trainer = train(base, arguments(tmp_path, save_steps=1), guard(strict=False))
    assert trainer.state.global_step == 3
    (line,) = lines(logging.ERROR)
    assert line.startswith(f"Writing {tmp_path}/run/checkpoint-1/qk_restored failed: OSError: ")
    assert "No space left" in line and "`qkguard restore`" in line
    assert not (tmp_path / "run/checkpoint-1/qk_restored").exists() and nothing_left(tmp_path)
    for step in (2, 3):
        verify(tmp_path / f"run/checkpoint-{step}/qk_restored")


def test_strict_raises_when_ranks_meet_next(base, tmp_path, full_disk):
    class Steps(TrainerCallback):
        begun = 0

        def on_step_begin(self, args, state, control, **kwargs):
            self.begun += 1

    with pytest.raises(OSError, match="No space left"):
        run_with(base, tmp_path, guard(), OnlySaves(1, 3), steps := Steps(), save_steps=1, max_steps=4)
    assert steps.begun == 3, "not in the middle, at the next save"


def test_strict_raises_at_the_end(base, tmp_path, full_disk):
    with pytest.raises(OSError, match="No space left"):
        train(base, arguments(tmp_path, max_steps=1, save_steps=1), guard(final_export=False))
    assert nothing_left(tmp_path)


def test_a_changed_reference_ends_the_training_whatever_strict_says(base, tmp_path):
    def change() -> None:
        file = tmp_path / "run/_qkguard/reference.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    with pytest.raises(QKGuardError, match="has changed since"):
        run_with(base, tmp_path, guard(strict=False), AtStep(step_1=change), save_steps=2, max_steps=4)
    assert not list((tmp_path / "run").glob("checkpoint-*/qk_restored"))


def test_adapters_are_written_beside_the_training_too(base, tmp_path, lines, monkeypatch):
    from qkguard.training import adapter_weights

    original, threads = adapter_weights.assemble_restored_adapter, []

    def assemble(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        if len(threads) == 1:
            raise OSError(28, "No space left on device")
        return original(*args, **options)

    monkeypatch.setattr(adapter_weights, "assemble_restored_adapter", assemble)
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    train(base, arguments(tmp_path, save_steps=1), guard(strict=False), peft_config=lora)
    assert set(threads) == {"qkguard-write"} and len(threads) == 4
    assert len(lines(logging.ERROR)) == 1 and "checkpoint-1/qk_restored/default failed" in lines(logging.ERROR)[0]
    run = tmp_path / "run"
    assert not (run / "checkpoint-1/qk_restored").exists() and nothing_left(run)
    for folder in (run / "checkpoint-2", run / "checkpoint-3", run / "_qkguard/final"):
        verify(folder / "qk_restored/default")


# -- rotation -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_rotated_under_its_write_ends_it_quietly(base, tmp_path, gate, lines):
    gone = tmp_path / "run/checkpoint-1"
    gate.may_open = lambda: not gone.exists() or gate.count > 1
    train(base, arguments(tmp_path, save_steps=1, save_total_limit=1), guard())
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not lines(logging.ERROR) and not lines(logging.WARNING)
    assert [line for line in lines(logging.INFO) if "checkpoint-1 was removed while" in line]
    verify(tmp_path / "run/checkpoint-3/qk_restored")
    assert nothing_left(tmp_path)


def test_a_checkpoint_rotated_just_before_the_rename_is_not_brought_back(base, tmp_path, gate, lines):
    """The thread has made everything; Trainer removes the checkpoint before its next event."""
    callback = guard()

    def remove() -> None:
        gate.open.set()
        is_done(callback)
        shutil.rmtree(tmp_path / "run/checkpoint-1")

    run_with(base, tmp_path, callback, OnlySaves(1), AtStep(step_2=remove), save_steps=1)
    assert not (tmp_path / "run/checkpoint-1").exists() and nothing_left(tmp_path)
    assert [line for line in lines(logging.INFO) if "checkpoint-1 was removed while" in line]


def test_what_is_left_of_a_checkpoint_goes_too(base, tmp_path, lines):
    """Somebody else's `rm -r` that the rename has overtaken; but a restored model kept on purpose stays."""
    run = tmp_path / "run"

    def overtaken() -> None:
        for path in (run / "checkpoint-1").iterdir():
            if path.is_file():
                path.unlink()
        (run / "checkpoint-2/model.safetensors").unlink()

    actions = {"step_3": overtaken}

    class Ended(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            write = callback.session.background._write
            if write is not None:
                write.wait()

    callback = guard()
    run_with(base, tmp_path, callback, OnlySaves(1, 2, 4), AtStep(**actions), Ended(), save_steps=1, max_steps=4)
    assert (run / "checkpoint-2/qk_restored/qkguard.json").is_file()
    assert (run / "checkpoint-1").exists(), "its write was over long before"
    again = make_trainer(base, arguments(tmp_path, max_steps=5, save_steps=5), guard())
    assert not (run / "checkpoint-1").exists()
    assert (run / "_qkguard/superseded/checkpoint-1/qkguard.json").is_file(), "set aside, not deleted"
    del again


def test_a_leftover_is_removed_when_ranks_meet(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "qk_restored").mkdir(parents=True)
    write = Write((checkpoint / "qk_restored",), (checkpoint / "a",), lambda heed: [], Save(1, {}, checkpoint))
    write.remove_leftover()
    assert not checkpoint.exists() and write.removed
    for keeps in ("trainer_state.json", "raw"):
        (checkpoint / "qk_restored").mkdir(parents=True)
        (checkpoint / keeps).touch()
        write.remove_leftover()
        assert (checkpoint / "qk_restored").exists()
        shutil.rmtree(checkpoint)


def test_resume_never_finds_a_checkpoint_of_a_restored_model_alone(base, tmp_path):
    train(base, arguments(tmp_path, save_steps=2, max_steps=2), guard())
    run = tmp_path / "run"
    shutil.copytree(run / "checkpoint-2/qk_restored", run / "checkpoint-7/qk_restored")
    trainer = make_trainer(base, arguments(tmp_path, max_steps=4, save_steps=4), guard())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and not (run / "checkpoint-7").exists()
    assert (run / "_qkguard/superseded/checkpoint-7/qkguard.json").is_file()


def test_a_late_rename_does_not_make_a_checkpoint_younger(base, tmp_path, gate):
    """Rotation goes by times: a checkpoint whose restored model comes after the next save must not outlive that."""
    run = tmp_path / "run"
    gate.may_open = lambda: (run / "checkpoint-2/trainer_state.json").exists() or gate.count > 1
    train(base, arguments(tmp_path, save_steps=1, max_steps=2), guard())
    assert (run / "checkpoint-1/qk_restored").exists()
    older, newer = ((run / f"checkpoint-{step}").stat().st_mtime_ns for step in (1, 2))
    restored = (run / "checkpoint-1/qk_restored/qkguard.json").stat().st_mtime_ns
    assert older < newer and restored > older, "the folder was renamed later than its checkpoint's time says"


def test_best_model_and_rotation(base, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "eval_loss", "save_total_limit": 1, "learning_rate": 0.3}
    args = arguments(tmp_path, save_steps=1, **options)
    trainer = train(base, args, guard(), eval_dataset=token_rows(8))
    best = Path(trainer.state.best_model_checkpoint)
    assert list((tmp_path / "run").glob("checkpoint-*/qk_restored")) == [best / "qk_restored"]
    judge.judge_restored("llama", base, best, best / "qk_restored", torch.float32)
    final = tmp_path / "run/_qkguard/final"
    assert judge.weights_in_bits(final / "raw") == judge.weights_in_bits(best)
    judge.judge_restored("llama", base, final / "raw", final / "qk_restored", torch.float32)
    assert nothing_left(tmp_path)


# -- guard.save -----------------------------------------------------------------------------------------------------


def test_save_by_hand_waits_unless_told_not_to(base, tmp_path, gate):
    trainer = train(base, arguments(tmp_path, save_strategy="no"), callback := guard(final_export=False))
    out = tmp_path / "mine/qk_restored"
    callback.save(trainer, tmp_path / "mine", wait=False)
    assert gate.begun.wait(GATE_SECONDS) and not out.exists()
    gate.open.set()
    callback.session.background._write.wait()
    verify(out)
    judge.judge_restored("llama", base, tmp_path / "mine", out, torch.float32)
    first = (out / "qkguard.json").stat().st_ino
    callback.save(trainer, tmp_path / "mine")
    assert (out / "qkguard.json").stat().st_ino != first, "made anew, and there when save() returns"
    assert len(seconds(tmp_path / "run", "save")) == 2 and len(seconds(tmp_path / "run", "save_background")) == 1


def test_save_by_hand_that_fails(base, tmp_path, full_disk, lines):
    trainer = train(base, arguments(tmp_path, save_strategy="no"), callback := guard(final_export=False, strict=False))
    with pytest.raises(OSError, match="No space left"):
        callback.save(trainer, tmp_path / "mine")
    callback.save(trainer, tmp_path / "mine", wait=False)
    callback.session.background._write.wait()
    (line,) = lines(logging.ERROR)
    assert f"Writing {tmp_path}/mine/qk_restored failed" in line and "No space left" in line
    assert (tmp_path / "mine/model.safetensors").exists() and not (tmp_path / "mine/qk_restored").exists()
    assert nothing_left(tmp_path)


def test_a_second_train_waits_for_what_an_interrupted_one_began(base, tmp_path, gate):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    callback, run = guard(), tmp_path / "run"
    trainer = make_trainer(base, arguments(tmp_path, save_steps=1), callback)
    trainer.add_callback(interrupt := Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert gate.begun.is_set() and not (run / "checkpoint-1/qk_restored").exists()
    trainer.remove_callback(interrupt)
    gate.open.set()
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    for step in (1, 2, 3):
        verify(run / f"checkpoint-{step}/qk_restored")


# -- ranks that share a disk ----------------------------------------------------------------------------------------


def no_heed() -> None:
    pass


def test_shares_are_collected_and_failures_come_with_their_reason(tmp_path):
    place = Shares(tmp_path / "new")
    (tmp_path / "shares").mkdir()
    (tmp_path / "shares/rank-1.json").write_text("{}")  # a killed process's
    place.open()
    threading.Timer(0.1, place.leave, (2, [{"file": "c"}])).start()
    place.leave(1, [{"file": "b"}])
    assert sorted(record["file"] for record in place.collect(3, no_heed)) == ["b", "c"]
    assert place.collect(1, no_heed) == []
    place.leave_failure(2, OSError(28, "No space left on device"))
    with pytest.raises(ShareError, match=r"rank 2: OSError: .*No space left"):
        place.collect(3, no_heed)
    place.open()
    (tmp_path / "shares/rank-1.failed").touch()
    with pytest.raises(ShareError, match="rank 1: it failed and could not write why"):
        place.collect(3, no_heed)


def test_a_rank_without_a_sign_of_life_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(shares, "BEAT_SECONDS", 0.0)
    place = Shares(tmp_path / "new")
    place.open()
    started, beats = time.monotonic(), threading.Event()

    def beat() -> None:
        for _ in range(12):
            place.beat(1)
            time.sleep(0.05)
        beats.set()

    threading.Thread(target=beat).start()
    with pytest.raises(QKGuardError, match="Rank 1 has written nothing for 0 s"):
        place.collect(2, no_heed)
    assert beats.is_set() and time.monotonic() - started > 0.8, "not while it beats"


def test_a_rank_that_nobody_waits_for_gives_up(tmp_path):
    place = Shares(tmp_path / "new")
    with pytest.raises(ShareError, match="rank 0 gave up"), shares.telling(place, 1):
        place.beat(1)
    place.open()
    with pytest.raises(ZeroDivisionError), shares.telling(place, 1):
        raise ZeroDivisionError("by zero")
    with pytest.raises(ShareError, match="rank 1: ZeroDivisionError: by zero"):
        place.collect(2, no_heed)


def test_a_rank_that_writes_while_rank_0_clears_up_has_not_failed(tmp_path, monkeypatch):
    """Nor does it name itself as the cause: what it misses was taken away."""
    place = Shares(tmp_path / "new")
    place.open()
    told: list[str] = []

    def discard() -> None:  # rank 1 is about to leave its records
        with pytest.raises(ShareError, match="rank 0 gave up"), shares.telling(place, 1):
            place.leave(1, [])
        told.append("gave up")

    def broken(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shares, "write_files", broken)
    staging: Any = SimpleNamespace(folder=tmp_path / "new", discard=discard)
    with pytest.raises(OSError, match="No space left"):
        shares.write_together(None, staging, 2, {}, no_heed)  # type: ignore[arg-type]
    assert told == ["gave up"] and not (tmp_path / "shares").exists()
    place.open()
    with pytest.raises(OSError, match="No space left"), shares.telling(place, 1):
        broken()  # a failure of its own stays one


# -- the end of the process -----------------------------------------------------------------------------------------


def test_a_forked_process_has_no_say(tmp_path):
    """Data loaders fork workers from a training; their end is not the write's."""
    opened, done = threading.Event(), []
    (tmp_path / "trainer_state.json").touch()

    def make(heed: Any) -> list[Any]:
        opened.wait(GATE_SECONDS)
        return []

    writer = BackgroundWriter(True, done.append)
    writer.begin("writing", Write((tmp_path / "x",), (), make, Save(1, {}, tmp_path)))
    child = multiprocessing.get_context("fork").Process(target=writer.look)
    child.start()
    child.join(30)
    assert child.exitcode == 0 and not done and writer in background._running
    opened.set()
    writer.finish()
    assert len(done) == 1 and writer not in background._running


SCRIPT = """
import os, sys, threading, time
from pathlib import Path
from tests.support.training import arguments, make_trainer, save_base, train
from tests.training.test_background import Gate, OnlySaves, guard
from transformers import TrainerCallback
from qkguard.checkpoint import shares

folder = Path(sys.argv[1])
base = save_base(folder / "base", "llama")

class End(TrainerCallback):
    def __init__(self, error):
        self.error = error
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise self.error

def fork(how):
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = os.open(folder / f"{how}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    return None

def end_of(how):
    shares.write_files = gate = Gate()
    if how == "save":
        guarded = guard(final_export=False)
        trainer = train(base, arguments(folder / how, save_strategy="no"), guarded)
        guarded.save(trainer, folder / how / "mine", wait=False)
    if how in ("save", "error"):
        threading.Timer(1.0, gate.open.set).start()
    if how != "save":
        error = {"error": ValueError, "ctrl-c": KeyboardInterrupt, "exit": SystemExit}[how]
        if how == "exit":
            gate.open.set()
        trainer = make_trainer(base, arguments(folder / how, save_steps=1), guard())
        trainer.add_callback(End(error))
        trainer.train()

for how in ("save", "error", "ctrl-c", "exit"):
    started = time.monotonic()
    code = fork(how)
    if code is None:
        end_of(how)
        break
    print("ended", how, code, round(time.monotonic() - started, 1), flush=True)
"""


def test_exits_in_the_middle_of_a_write(tmp_path):
    """The end of a process waits for its write, after an exception too; after Ctrl-C it gives it up at once."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=240,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr[-3000:]
    outcomes = {
        how: (int(code), float(took)) for how, code, took in re.findall(r"ended (\S+) (\S+) (\S+)\n", started.stdout)
    }
    logs = {how: (tmp_path / f"{how}.log").read_text() for how in outcomes}
    assert {how: code for how, (code, _) in outcomes.items()} == {"save": 0, "error": 1, "ctrl-c": -2, "exit": 0}, logs
    verify(tmp_path / "save/mine/qk_restored")
    for how in ("error", "exit"):
        verify(tmp_path / how / "run/checkpoint-1/qk_restored")
    assert outcomes["ctrl-c"][1] < GATE_SECONDS / 2, outcomes
    assert not (tmp_path / "ctrl-c/run/checkpoint-1/qk_restored").exists()
    assert "The process ended before" in logs["ctrl-c"] and "was written. The raw checkpoint is safe" in logs["ctrl-c"]
    assert nothing_left(tmp_path) and "Traceback" not in logs["save"] + logs["exit"], logs


# -- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_nothing_half_written(tmp_path, count):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.support.kills", str(tmp_path), str(count), "7"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=60 * count
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(rf"^{count} of \d+ kills", done.stdout, re.M), done.stdout


@pytest.mark.parametrize("damage", ["no manifest", "a file short", "another byte"])
def test_the_check_after_a_kill_finds_what_is_half_written(base, tmp_path, damage):
    train(base, arguments(tmp_path, max_steps=1, save_steps=1), guard(final_export=False))
    made = tmp_path / "run/checkpoint-1/qk_restored"
    kills.check(tmp_path / "run")
    if damage == "no manifest":
        (made / "qkguard.json").unlink()
    else:
        data = bytearray((made / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (made / "model.safetensors").write_bytes(data[: -1 if damage == "a file short" else None])
    with pytest.raises(QKGuardError):
        kills.check(tmp_path / "run")


# -- saves on SIGTERM -----------------------------------------------------------------------------------------------


class Terminates(TrainerCallback):
    """Sends this process what a cluster sends before it takes the machine away, and gives its answer time."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)


class StopsEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("save_steps", [100, 2])
def test_a_save_on_sigterm_is_restored_and_resumed_from(base, tmp_path, save_steps, caplog, monkeypatch):
    """Trainer's just-in-time checkpoint tells no callback of it, and may write an ordinary one of its step anew."""
    monkeypatch.setattr(CheckpointManager.__init__, "__defaults__", (0,))  # seconds that it waits for SIGKILL
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    args = arguments(tmp_path, max_steps=6, save_steps=save_steps, enable_jit_checkpoint=True)
    trainer = make_trainer(base, args, guard())
    trainer.add_callback(Terminates())
    trainer.train()
    raw, final = tmp_path / "run/checkpoint-2", tmp_path / "run/_qkguard/final"
    assert verify(raw / "qk_restored", full=True)["raw"] == "unchanged"
    assert f"stopped right after {raw} was saved" in caplog.text and not final.exists() and nothing_left(tmp_path)
    again = make_trainer(base, arguments(tmp_path, max_steps=4, save_steps=save_steps), guard())
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    verify(final / "qk_restored", full=True)


def test_a_training_that_stops_early_by_itself_ends_as_usual(base, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    trainer = make_trainer(base, arguments(tmp_path, max_steps=6, save_steps=2, enable_jit_checkpoint=True), guard())
    trainer.add_callback(StopsEarly())
    trainer.train()
    assert trainer.state.global_step == 2 and "right after" not in caplog.text
    verify(tmp_path / "run/_qkguard/final/qk_restored", full=True)
