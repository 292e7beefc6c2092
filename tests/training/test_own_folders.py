"""A folder is this run's because this training saved it, never because of its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from qkguard import QKGuardCallback
from qkguard.training.resume import set_aside
from tests.support import judge
from tests.support.training import arguments, make_trainer, save_base, token_rows, train


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "minimax")


def guard(**options) -> QKGuardCallback:
    return QKGuardCallback(**{"strict": True, "probe_steps": 0} | options)


def is_live(final: dict[str, bytes], trainer) -> bool:
    """Whether a model's files hold the trainer's weights, as far as names on disk are those in memory."""
    live = {name: tensor.numpy().tobytes() for name, tensor in trainer.model.state_dict().items()}
    shared = final.keys() & live.keys()
    assert len(shared) > 20
    return all(final[name] == live[name] for name in shared)


def test_the_final_model_is_this_trainings_not_an_earlier_runs(base, tmp_path):
    train(base, arguments(tmp_path, max_steps=4, save_steps=4), guard())
    run = tmp_path / "run"
    first = judge.weights_in_bits(run / "checkpoint-4")
    second = train(base, arguments(tmp_path, max_steps=4, learning_rate=3e-3, save_strategy="no"), guard())
    final = judge.weights_in_bits(run / "_qkguard/final/raw")
    assert is_live(final, second) and not is_live(first, second)
    judge.judge_restored(
        "minimax", base, run / "_qkguard/final/raw", run / "_qkguard/final/qk_restored", torch.float32
    )


def test_a_save_of_this_training_is_linked(base, tmp_path):
    train(base, arguments(tmp_path, max_steps=2, save_steps=2), guard())
    run = tmp_path / "run"
    assert (run / "checkpoint-2/model.safetensors").samefile(run / "_qkguard/final/raw/model.safetensors")


def test_a_resumed_run_leaves_an_abandoned_branch_alone(base, tmp_path):
    train(base, arguments(tmp_path, max_steps=6, save_steps=2), guard())
    run = tmp_path / "run"
    abandoned = judge.weights_in_bits(run / "checkpoint-6")
    args = arguments(tmp_path, max_steps=6, save_strategy="no", learning_rate=3e-3)
    trainer = make_trainer(base, args, guard())
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    final = judge.weights_in_bits(run / "_qkguard/final/raw")
    assert is_live(final, trainer) and not is_live(abandoned, trainer)


def test_adapters_too(base, tmp_path):
    lora = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    train(base, arguments(tmp_path, max_steps=2, save_steps=2), guard(), peft_config=LoraConfig(**lora))
    run = tmp_path / "run"
    first = load_file(run / "checkpoint-2/adapter_model.safetensors")
    args = arguments(tmp_path, max_steps=2, learning_rate=3e-3, save_strategy="no")
    train(base, args, guard(), peft_config=LoraConfig(**lora))
    final = load_file(run / "_qkguard/final/raw/default/adapter_model.safetensors")
    assert final.keys() == first.keys() and any(not final[n].equal(first[n]) for n in final)


def test_what_an_earlier_guard_left_is_set_aside_before_the_first_step(base, tmp_path):
    train(base, arguments(tmp_path, max_steps=4, save_steps=2), guard())
    run = tmp_path / "run"
    seen = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.setdefault("restored", sorted(map(str, run.glob("checkpoint-*/qk_restored"))))
            seen.setdefault("final", (run / "_qkguard/final").exists())
            seen.setdefault("raw", sorted(p.name for p in run.glob("checkpoint-*")))

    args = arguments(tmp_path, max_steps=4, save_steps=4, learning_rate=3e-3)
    trainer = make_trainer(base, args, guard(restore_on="end"))
    trainer.add_callback(Look())
    trainer.train()
    assert seen == {"restored": [], "final": False, "raw": ["checkpoint-2", "checkpoint-4"]}
    assert not list(run.glob("checkpoint-*/qk_restored")), "these would be the first run's, in rewritten checkpoints"
    assert list((run / "_qkguard/superseded").iterdir()), "set aside, not deleted"


def test_a_restored_folder_never_outlives_a_rewritten_checkpoint(base, tmp_path):
    """restore_on="best": a save that is not the best one rewrites a checkpoint that an earlier guard had restored."""
    run = tmp_path / "run"
    train(base, arguments(tmp_path, max_steps=2, save_steps=2), guard())

    class PutBack(TrainerCallback):
        """As if the earlier guard's folder had appeared after the start (a copy, a sync)."""

        def on_step_end(self, args, state, control, **kwargs):
            aside = next((run / "_qkguard/superseded").iterdir(), None)
            if aside is not None and not (run / "checkpoint-2/qk_restored").exists():
                aside.rename(run / "checkpoint-2/qk_restored")

    args = arguments(tmp_path, max_steps=2, save_steps=2, learning_rate=3e-3)
    trainer = make_trainer(base, args, guard(restore_on="best"))
    trainer.add_callback(PutBack())
    trainer.train()
    assert not (run / "checkpoint-2/qk_restored").exists()


def test_a_run_may_start_again_hundreds_of_times(tmp_path):
    """What is set aside again and again keeps short names, in order: a name that grew would be refused by the disk."""
    for n in range(300):
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1/n").write_text(str(n))
        moved = set_aside(tmp_path / "checkpoint-1", tmp_path / "run", "checkpoint-1")
        assert (moved / "n").read_text() == str(n)
    names = {f"checkpoint-1_{n}" for n in range(2, 301)} | {"checkpoint-1"}
    assert {path.name for path in (tmp_path / "run/superseded").iterdir()} == names


def test_rows_kept_by_an_earlier_training_are_set_aside(base, tmp_path):
    """The earlier one may have had other data; a resumed run keeps its own."""
    rows = token_rows(4)
    args = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "save_steps": 2}
    train(base, arguments(tmp_path, **args), guard(), eval_dataset=rows)
    kept = tmp_path / "run/_qkguard/heldout.jsonl"
    assert kept.is_file()
    train(base, arguments(tmp_path, max_steps=3), guard(), resume=True)
    assert kept.is_file()
    train(base, arguments(tmp_path, max_steps=2, save_steps=2), guard())
    assert not kept.exists() and (tmp_path / "run/_qkguard/superseded/heldout.jsonl").is_file()
