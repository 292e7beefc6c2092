"""What runs on real ranks. Every case gets an empty folder and raises on failure; all ranks run it."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from trl import SFTConfig

from qkguard import QKGuardCallback, QKGuardError, restore_checkpoint
from qkguard.checkpoint import shares
from qkguard.checkpoint.reference_file import write_reference
from qkguard.checkpoint.write import write_files
from qkguard.distributed import sharding
from tests.distributed.launch import sharded_at_loading, sharding_of
from tests.support import judge
from tests.support.models import noised
from tests.support.training import OnlySaves, arguments, make_trainer, save_base, saved_in_shards, train

STEPS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def reset() -> None:
    """Forget the previous case's accelerator and DeepSpeed settings."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    logging.getLogger("qkguard").handlers[:] = [logging.NullHandler()]


def rank() -> int:
    return dist.get_rank()


def base_model(folder: Path, name: str = "minimax", **options: Any) -> Path:
    """A base checkpoint with tokenizer, written once by rank 0."""
    base = folder / "base"
    if rank() == 0:
        save_base(base, name, **options)
    dist.barrier()
    return base


def deepspeed_config(stage: int, tight: bool = True, offload: bool = False, gather: bool = True) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = gather
        if tight:  # hides faults: nothing stays gathered (DeepSpeed's defaults keep small parameters whole)
            zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
            zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def single_process_reference(folder: Path, base: Path, dtype: torch.dtype) -> str:
    """sha256 of the reference file that one process makes of the same base."""
    from qkguard.distributed import ranks
    from qkguard.distributed.reference import Reference
    from qkguard.layout import find_attention, select

    kept = (ranks.rank, ranks.world_size)
    ranks.rank, ranks.world_size = (lambda: 0), (lambda: 1)
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        reference = Reference.take(model, select(find_attention(model)))
        write_reference(reference, folder / "single", {"base": {}, "versions": {}})
    finally:
        ranks.rank, ranks.world_size = kept
    return judge.file_sha256(folder / "single" / "reference.safetensors")


def check_run(folder: Path, base: Path, name: str, dtype: torch.dtype, step: int = STEPS, raw: str = "") -> None:
    """Rank 0: reference, drift and checkpoints of a finished run against independent computations."""
    reset()  # else loading a model would partition it, which one rank cannot do alone
    run = folder / "run"
    checkpoint, guard = run / f"checkpoint-{step}", run / "_qkguard"
    assert judge.file_sha256(guard / "reference.safetensors") == single_process_reference(folder, base, dtype)
    judge.judge_restored(name, base, checkpoint / raw, checkpoint / "qk_restored", dtype)
    judge.judge_restored(name, base, guard / "final/raw", guard / "final/qk_restored", dtype)
    last = [row for row in judge.metrics_rows(run) if row["step"] == step and "qkguard/drift/q_rel" in row][-1]
    for part in "qk":
        wanted = judge.drift_by_layer(name, part, base, checkpoint / raw, dtype)
        for layer, want in wanted.items():
            got = last[f"qkguard/drift/layer_{layer}/{part}_rel"]
            assert abs(got / want - 1) < 1e-6, (layer, part, got, want)
        mean = sum(wanted.values()) / len(wanted)
        assert abs(last[f"qkguard/drift/{part}_rel"] / mean - 1) < 1e-6
        assert abs(last[f"qkguard/drift/{part}_rel/max"] / max(wanted.values()) - 1) < 1e-6
    for folder_ in (checkpoint / "qk_restored", guard / "final" / "raw", guard / "final" / "qk_restored"):
        _, info = AutoModelForCausalLM.from_pretrained(folder_, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
    left = [p.name for p in guard.iterdir() if p.name.startswith("_")]
    assert not left, left


def check_share(guard: QKGuardCallback) -> None:
    """The ranks' shares of the reference add up to Q and K once, and are about even."""
    reference = guard.session.reference
    sizes = torch.zeros(dist.get_world_size())
    sizes[rank()] = reference.nbytes
    dist.all_reduce(sizes)
    total = sum(m.numel * reference.slices[m.name].element_size() for m in reference.maps.values())
    assert sizes.sum() == total, (sizes, total)
    assert sizes.max() <= 1.2 * total / len(sizes) + 64 * len(reference.maps)


def check_backend(guard: QKGuardCallback, backend: str) -> None:
    """The guarded model was sharded as the case says, and not trained as DDP instead."""
    wanted = {"zero3": "zero3", "fsdp2": "fsdp2", "loaded_fsdp2": "fsdp2"}.get(backend, "replicated")
    assert sharding.backend(guard.session.model) == wanted


# -- cases: what the tests run, by name ----------------------------------------------------------


def guarded(folder: Path, backend: str, dtype: str = "fp32", name: str = "minimax", *flags: str) -> None:
    """One guarded training: `backend` is ddp, zero1 to zero3, fsdp2 or loaded_fsdp2.

    Flags: default, offload, nogather, trainer.
    """
    base = base_model(folder, name)
    options: dict[str, Any] = {"bf16": dtype == "bf16"}
    if backend.startswith("zero"):
        options["deepspeed"] = deepspeed_config(
            int(backend[-1]), "default" not in flags, "offload" in flags, "nogather" not in flags
        )
    guard = QKGuardCallback(routing_drift_steps=2, strict=True)
    model = AutoModelForCausalLM.from_pretrained(base) if "trainer" in flags else None
    if backend == "loaded_fsdp2":
        model, options["save_only_model"] = sharded_at_loading(base), True
    with sharding_of(backend):
        args = arguments(folder, TrainingArguments if "trainer" in flags else SFTConfig, **options)
        train(base, args, guard, model=model)
    check_share(guard)
    check_backend(guard, backend)
    held = DTYPES[dtype] if backend.startswith("zero") else torch.float32  # DeepSpeed's bf16 holds the weights in it
    if rank() == 0:
        check_run(folder, base, name, held, raw="raw" if "nogather" in flags else "")
        described = json.loads((folder / "run/_qkguard/reference.json").read_text())
        assert {t["dtype"] for t in described["tensors"].values()} == {str(held).removeprefix("torch.")}
    dist.barrier()


def neutral(folder: Path, backend: str, *flags: str) -> None:
    """With and without the guard: losses, gradient norms, weights and random streams are bit-identical."""
    base = base_model(folder, "qwen3_next")
    outcomes = []
    for guarded_run in (False, True):
        reset()
        options: dict[str, Any] = {"gradient_checkpointing": "checkpointing" in flags}
        if backend.startswith("zero"):
            options["deepspeed"] = deepspeed_config(int(backend[-1]), tight="default" not in flags)
        part = folder / str(guarded_run)
        model = AutoModelForCausalLM.from_pretrained(base, attention_dropout=0.2)
        guard = QKGuardCallback(routing_drift_steps=1, strict=True) if guarded_run else None
        trainer = train(base, arguments(part, **options), guard, model=model)
        weights = judge.weights_in_bits(part / "run" / f"checkpoint-{STEPS}")
        streams = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
        outcomes.append((trainer.recorder.rows, weights, streams))
    (losses, weights, streams), (losses2, weights2, streams2) = outcomes
    assert len(losses) == STEPS and losses == losses2, (losses, losses2)
    assert weights == weights2
    assert torch.equal(streams[0], streams2[0]) and streams[1:] == streams2[1:]
    assert weights != judge.weights_in_bits(base), "training moved nothing"


def resumed(folder: Path, backend: str, *flags: str) -> None:
    """A resumed run keeps the first reference; without it, it stops on all ranks and names the ways out."""
    base = base_model(folder)
    options: dict[str, Any] = {"save_steps": 2}
    if backend.startswith("zero"):
        options["deepspeed"] = deepspeed_config(int(backend[-1]), tight="default" not in flags)
    with sharding_of(backend):
        train(base, arguments(folder, **options | {"max_steps": 2}), QKGuardCallback(strict=True))
    digest = judge.file_sha256(folder / "run/_qkguard/reference.safetensors")
    dist.barrier()
    reset()
    guard = QKGuardCallback(strict=True)
    with sharding_of(backend):
        train(base, arguments(folder, **options | {"max_steps": 4}), guard, resume=True)
    assert "resumed" in guard.session.weights.origin
    check_backend(guard, backend)
    if rank() == 0:
        assert judge.file_sha256(folder / "run/_qkguard/reference.safetensors") == digest
        check_run(folder, base, "minimax", torch.float32, step=4)
        steps = [r["step"] for r in judge.metrics_rows(folder / "run") if "qkguard/drift/q_rel" in r]
        assert sorted(set(steps)) == [1, 2, 3, 4], steps
    dist.barrier()
    damage_and_resume(folder, base, backend, options)


def damage_and_resume(folder: Path, base: Path, backend: str, options: dict[str, Any]) -> None:
    file = folder / "run/_qkguard/reference.safetensors"
    for damage, message in (("flip", "has changed since"), ("remove", "is missing")):
        if rank() == 0:
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data) if damage == "flip" else file.unlink()
        dist.barrier()
        reset()
        try:
            with sharding_of(backend):
                train(base, arguments(folder, **options | {"max_steps": 6}), QKGuardCallback(), resume=True)
        except QKGuardError as error:
            assert message in str(error) and "base_model=" in str(error), error
        else:
            raise AssertionError("a run was resumed on a wrong reference")
    reset()
    guard = QKGuardCallback(base_model=str(base), strict=True)
    with sharding_of(backend):
        train(base, arguments(folder, **options | {"max_steps": 6}), guard, resume=True)
    if rank() == 0:
        check_run(folder, base, "minimax", torch.float32, step=6)
    dist.barrier()


def continued_elsewhere(folder: Path, ranks: str) -> None:
    """Resume on this number of ranks a DDP run that another number of ranks began."""
    other = folder.parent.parent / ranks / "guarded@ddp,fp32,minimax"
    if rank() == 0:
        shutil.copytree(other, folder)
        for state in (folder / "run").glob("checkpoint-*/rng_state*"):
            state.unlink()
    dist.barrier()
    guard = QKGuardCallback(strict=True)
    train(folder / "base", arguments(folder, max_steps=STEPS + 2, save_steps=STEPS + 2), guard, resume=True)
    if rank() == 0:
        check_run(folder, folder / "base", "minimax", torch.float32, step=STEPS + 2)
    dist.barrier()


def wrong_start(folder: Path) -> None:
    """A reference of other weights stops all ranks at step 0; equal weights go on with the one that is there."""
    base = base_model(folder)
    train(base, arguments(folder), QKGuardCallback(strict=True))
    reset()
    again = QKGuardCallback(strict=True)
    train(base, arguments(folder), again)
    assert "bit-equal" in again.session.weights.origin
    reset()
    moved = noised(AutoModelForCausalLM.from_pretrained(base), seed=5)
    moved.config._name_or_path = ""
    try:
        train(base, arguments(folder), QKGuardCallback(), model=moved)
    except QKGuardError as error:
        assert "reference of another run" in str(error), error
    else:
        raise AssertionError("trained on another run's reference")


def failing_write(folder: Path) -> None:
    """A write that fails on one rank: training goes on everywhere, and with `strict` it ends on all ranks alike."""
    base = base_model(folder)
    last = dist.get_world_size() - 1

    def broken(*args, **kwargs):
        if rank() == last:
            raise OSError(28, "No space left on device")
        return write_files(*args, **kwargs)

    shares.write_files = broken
    try:
        with saved_in_shards():
            train(base, arguments(folder, save_steps=1), QKGuardCallback())
            assert not list((folder / "run").glob("checkpoint-*/qk_restored"))
            dist.barrier()  # rank 0 clears up after the others have heard of the failure
            assert not list((folder / "run").rglob("_qkguard-tmp-*")), "a temporary folder was left"
            stops_if_strict(base, folder, f"failed on rank {last}: ")
    finally:
        shares.write_files = write_files


def beside_training(folder: Path) -> None:
    """A rank that is slow to write its share holds nobody up, and what comes out is what `qkguard restore` writes."""
    base = base_model(folder, "llama")
    last, gate, seen = dist.get_world_size() - 1, folder / "open", {}

    def slow(plan, place, number=0, world=1, progress=None):
        seen.setdefault("ranks", world)
        while rank() == last and not gate.exists():
            progress(0, 1)
            time.sleep(0.01)
        return write_files(plan, place, number, world, progress)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            out = folder / "run/checkpoint-1/qk_restored"
            seen[state.global_step] = out.exists()
            dist.barrier()
            if state.global_step == 3 and rank() == 0:
                gate.touch()

    shares.write_files = slow
    try:
        with saved_in_shards():
            guard = QKGuardCallback(strict=True)
            trainer = make_trainer(base, arguments(folder, save_steps=1, max_steps=4, save_strategy="steps"), guard)
            trainer.add_callback(Watch())
            trainer.add_callback(OnlySaves(1))
            trainer.train()
    finally:
        shares.write_files = write_files
    assert seen["ranks"] == last + 1 and not any(seen[step] for step in (1, 2, 3)), seen
    if rank() == 0:
        reset()
        raw = folder / "run/checkpoint-1"
        judge.judge_restored("llama", base, raw, raw / "qk_restored", torch.float32)
        restore_checkpoint(base, raw, folder / "by_hand")
        made, wanted = (judge.weight_hashes(place) for place in (raw / "qk_restored", folder / "by_hand"))
        assert made == wanted and len(made) > last and made != judge.weight_hashes(raw)
        waited = [
            row["qkguard/overhead/save_seconds"]
            for row in judge.metrics_rows(folder / "run")
            if "qkguard/overhead/save_seconds" in row
        ]
        assert len(waited) == 2, "one save, and the end"
    dist.barrier()


def failing_page(folder: Path) -> None:
    """A page that rank 0 cannot write: the run is done all the same, and with `strict` it ends on all ranks alike."""
    from qkguard.training.metrics_log import MetricsLog

    base = base_model(folder)
    original = MetricsLog.write_page

    def broken(self):
        raise OSError(28, "No space left on device")

    MetricsLog.write_page = broken
    try:
        train(base, arguments(folder), QKGuardCallback())
        stops_if_strict(base, folder, "writing the run's page failed on rank 0: ")
    finally:
        MetricsLog.write_page = original


def stops_if_strict(base: Path, folder: Path, where: str) -> None:
    """A training on a disk that is full for one rank, with `strict`, raises on this rank too."""
    reset()
    try:
        train(base, arguments(folder / "strict"), QKGuardCallback(strict=True))
    except QKGuardError as error:
        assert where in str(error) and "No space left" in str(error), error
    else:
        raise AssertionError("strict went on")


def renamed(folder: Path) -> None:
    """Raw checkpoints that come out under other names (Qwen3.5 under ZeRO-3): a warning, and its repair works."""
    base = base_model(folder, "qwen3_5_text")
    for repair in (False, True):
        reset()
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, lines=lines: lines.append(record.getMessage())
        logging.getLogger("qkguard").handlers[:] = [handler]
        part = folder / str(repair)
        guard = QKGuardCallback(strict=True)
        trainer = make_trainer(base, arguments(part, deepspeed=deepspeed_config(3, tight=False)), guard)
        if repair:
            trainer.model._weight_conversions = [c for c in trainer.model._weight_conversions if c.was_used()]
        trainer.train()
        if rank() == 0:
            assert any("_weight_conversions" in line for line in lines) == (not repair), lines
            raw, restored = part / f"run/checkpoint-{STEPS}", part / f"run/checkpoint-{STEPS}/qk_restored"
            names = [set(judge.weights_in_bits(f)) for f in (base, raw, restored)]
            assert names[1] == names[2] and (names[0] == names[1]) == repair
            if repair:
                judge.judge_restored("qwen3_5_text", base, raw, restored, torch.float32)
            reset()
            for saved in (raw, restored):
                _, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
                assert not info["missing_keys"] and not info["unexpected_keys"], info
        dist.barrier()


def ranks_agree(folder: Path) -> None:
    """One rank's error is everybody's, results stay where they are made, and ranks that meet for different things, or
    hang, are named on all.
    """
    import time

    from qkguard.distributed import ranks
    from qkguard.errors import RankLostError, WrongReferenceError

    last = dist.get_world_size() - 1
    assert ranks.agree("counting", lambda: rank() * 10) == rank() * 10

    def fail() -> None:
        if rank() == last:
            raise WrongReferenceError("gone")

    with raises(WrongReferenceError, f"failing failed on rank {last}: gone"):
        ranks.agree("failing", fail)
    deferred = ranks.Deferred("deferring")
    deferred.run(fail)
    assert deferred.run(lambda: 1) == (None if rank() == last else 1)  # the collectives between go on
    with raises(WrongReferenceError, f"deferring failed on rank {last}: gone"):
        deferred.agree()
    time.sleep(0.05 * rank())
    assert ranks.on_rank_zero("deciding", lambda: {"a": [1, 2]}) == {"a": [1, 2]}
    assert ranks.held_by(last, "holding", rank) == (last if rank() == last else None)
    assert ranks.everywhere("testing", lambda: True)
    assert not ranks.everywhere("testing", lambda: rank() != last)
    assert ranks.agree(f"writing /node-{rank()}/out", lambda: True)  # paths may differ

    others = "rank 0" if last == 1 else "ranks 0, 1"
    with raises(QKGuardError, f"{others} for 'saving'; rank {last} for 'measuring'"):
        ranks.agree("measuring" if rank() == last else "saving", rank)
    assert ranks.agree("going on", rank) == rank()

    beat = ranks.HEARTBEAT_SECONDS
    ranks.HEARTBEAT_SECONDS = 0.2
    try:  # long work with signs of life outlives the timeout of the others; without them, a rank is given up
        time.sleep(beat)  # until the thread that gives the signs has seen the new interval
        ranks.agree("copying", lambda: time.sleep(1.5) if rank() == 0 else None, timeout=0.7)
        if rank() == last:
            time.sleep(2.5)
            ranks.agree("hanging", rank, timeout=0.7)
        else:
            with raises(RankLostError, f"hanging: rank {last} gave no sign of life"):
                ranks.agree("hanging", rank, timeout=0.7)
    finally:
        ranks.HEARTBEAT_SECONDS = beat
        dist.barrier()
        ranks._current = None  # where a rank is lost, nothing more can be agreed on


@contextmanager
def raises(kind: type[Exception], words: str) -> Iterator[None]:
    """The block must raise an error of this kind with these words in it."""
    try:
        yield
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nobody heard of it: {words}")
