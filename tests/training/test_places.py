"""Where folders are assembled and found: other file systems, hub uploads, hyperparameter search, moving scripts."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerState, TrainingArguments
from transformers import hyperparameter_search as backends
from transformers.trainer_utils import BestRun, get_last_checkpoint, sort_checkpoints

from qkguard import QKGuardCallback
from qkguard.checkpoint.staging import Staging
from qkguard.training.resume import saved_folder
from tests.support import judge
from tests.support.training import arguments, make_trainer, save_base, train

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
TEMPORARY = "_qkguard-tmp-"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "minimax")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than `tmp_path`."""
    if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system at hand")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def guard(**options: Any) -> QKGuardCallback:
    return QKGuardCallback(**{"strict": True, "probe_steps": 0} | options)


def judge_pair(base: Path, folder: Path, restored: Path | None = None) -> None:
    judge.judge_restored("minimax", base, folder, restored or folder / "qk_restored", torch.float32)


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob(f"{TEMPORARY}*"))


# -- file systems and modes ------------------------------------------------------------------------------------------


def test_the_run_folder_on_another_file_system(base, tmp_path, elsewhere):
    trainer = train(base, arguments(tmp_path), own := guard(output_dir=elsewhere / "guard"))
    judge_pair(base, tmp_path / "run/checkpoint-3")
    judge_pair(base, elsewhere / "guard/final/raw", elsewhere / "guard/final/qk_restored")
    for folder in (elsewhere / "saved", tmp_path / "saved", elsewhere / "guard/deep/saved"):
        own.save(trainer, folder)
        judge_pair(base, folder)
    assert not leftovers(tmp_path) and not leftovers(elsewhere)


def test_checkpoints_on_another_file_system_with_adapters(base, tmp_path, elsewhere):
    own = guard(output_dir=tmp_path / "guard")
    trainer = train(base, arguments(elsewhere), own, peft_config=LoraConfig(**LORA))
    own.save(trainer, tmp_path / "saved")
    for folder in (elsewhere / "run/checkpoint-3", tmp_path / "saved", tmp_path / "guard/final"):
        assert (folder / "qk_restored/default/qkguard.json").is_file()
    assert not leftovers(tmp_path) and not leftovers(elsewhere)


@pytest.mark.parametrize("adapters", [False, True])
def test_raw_checkpoints_keep_their_modes(adapters, base, tmp_path):
    """The final models are links to them; what safetensors writes is the owner's alone."""
    seen: dict[str, int] = {}

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.update(modes(tmp_path / "run/checkpoint-3"))

    options = {"peft_config": LoraConfig(**LORA)} if adapters else {}
    trainer = make_trainer(base, arguments(tmp_path), Look(), **options)
    trainer.add_callback(guard())
    trainer.train()
    now = modes(tmp_path / "run/checkpoint-3")
    assert {name: now[name] for name in seen} == seen
    file = "default/adapter_model.safetensors" if adapters else "model.safetensors"
    assert (tmp_path / "run/_qkguard/final/raw" / file).samefile(tmp_path / "run/checkpoint-3" / Path(file).name)
    assert seen[Path(file).name] == 0o600, "else nothing was there to change"
    assert now[f"qk_restored/{file}"] == 0o666 & ~umask()


def modes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


# -- what others see of a folder in the making -----------------------------------------------------------------------


def uploaded(output_dir: Path, checkpoint: Path) -> list[str]:
    """What Trainer's uploads would list now: of the output folder with its patterns, of the checkpoint everything."""
    top = [p.relative_to(output_dir).as_posix() for p in output_dir.rglob("*") if p.is_file()]
    shown = list(filter_repo_objects(top, ignore_patterns=["_*", "checkpoint-*"]))
    return shown + [str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()]


@pytest.mark.parametrize("run_folder", ["_qkguard", "visible"])
def test_a_folder_in_the_making_is_no_checkpoint_and_is_not_uploaded(base, tmp_path, monkeypatch, run_folder):
    run, looks = tmp_path / "run", []

    def look(*args, **kwargs):
        staged = [p for p in leftovers(tmp_path) if (p / "new/model.safetensors").is_file()]
        mine = [name for name in uploaded(run, run / "checkpoint-3") if "qk_restored" in name or TEMPORARY in name]
        looks.append((len(staged), [name for name in mine if "final/" not in name]))
        assert get_last_checkpoint(str(run)) == str(run / "checkpoint-3")
        assert sort_checkpoints(str(run), "checkpoint") == [str(run / "checkpoint-3")]
        return complete(*args, **kwargs)

    from qkguard.checkpoint import reuse, shares

    complete = shares.complete
    for module in (shares, reuse):  # the final folder is linked from the save's
        monkeypatch.setattr(module, "complete", look)
    train(base, arguments(tmp_path), guard(output_dir=run / run_folder))
    assert [staged for staged, _ in looks] == [1, 1], "one at the save and one at the end"
    assert looks[0][1] == []
    assert not [name for name in looks[1][1] if not name.startswith("qk_restored/")], "only what is published"
    assert any(name.startswith("qk_restored/") for name in uploaded(run, run / "checkpoint-3"))


def test_leftovers_of_killed_runs_are_removed_at_the_start(base, tmp_path):
    run = tmp_path / "run"
    places = ["", "checkpoint-9", "run-0/checkpoint-9/raw", "_qkguard", "_qkguard/final", "checkpoint-9/qk_restored"]
    for place in places:
        (run / place / f"{TEMPORARY}x/new").mkdir(parents=True)
    (run / "mine").mkdir()
    (run / "checkpoint-9/trainer_state.json").write_text("{}")
    with Staging(run / "living"):
        train(base, arguments(tmp_path, save_strategy="no"), guard())
        assert len(leftovers(run)) == 1, "the folder of a living writer stays"
    assert not leftovers(run) and (run / "mine").is_dir() and (run / "checkpoint-9").is_dir()


# -- which folder a save wrote ---------------------------------------------------------------------------------------


class Trial(dict):
    """A dictionary as W&B's trials are, with the attributes of optuna's."""


class Backend(backends.HyperParamSearchBackendBase):
    """Trainer's own search with a loop in the place of optuna's sampler."""

    name = "optuna"

    @staticmethod
    def is_available() -> bool:
        return True

    def run(self, trainer: Any, n_trials: int, direction: str, **kwargs: Any) -> BestRun:
        for number in range(n_trials):
            trainer.objective = None
            trial = Trial(number=number)
            trial.number, trial.params = number, dict(trial)
            trainer.train(trial=trial)
        return BestRun("0", 0.0, {})


@pytest.mark.parametrize("names", [False, True])
def test_hyperparameter_search_restores_where_each_trial_saves(base, tmp_path, monkeypatch, names):
    monkeypatch.setitem(backends.ALL_HYPERPARAMETER_SEARCH_BACKENDS, backends.HPSearchBackend.OPTUNA, Backend)
    args = arguments(tmp_path, TrainingArguments, max_steps=2, save_steps=1)
    own, run = guard(), tmp_path / "run"
    trainer = make_trainer(base, args, own)
    trainer.model_init = lambda: AutoModelForCausalLM.from_pretrained(base)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": 1e-2 / (1 + trial.number)},
        hp_name=(lambda trial: f"trial {trial.number}") if names else None,
        backend="optuna",
        n_trials=2,
    )
    folders = ["trial 0", "trial 1"] if names else ["run-0", "run-1"]
    for folder in folders:
        for step in (1, 2):
            judge_pair(base, run / folder / f"checkpoint-{step}")
    assert not list(run.glob("checkpoint-*")), "a second copy of a checkpoint"
    last = run / folders[1] / "checkpoint-2"
    assert (run / "_qkguard/final/raw/model.safetensors").samefile(last / "model.safetensors")
    assert own.session.saved == {1: run / folders[1] / "checkpoint-1", 2: last}


def test_the_folder_that_holds_this_state_is_found(tmp_path):
    """Another trial may write a checkpoint of this step later; an earlier run may have left one."""

    def written(folder: str, loss: float, seconds: int) -> TrainerState:
        state = TrainerState(global_step=4, log_history=[{"loss": loss, "step": 4}])
        (tmp_path / folder / "checkpoint-4").mkdir(parents=True)
        file = tmp_path / folder / "checkpoint-4/trainer_state.json"
        state.save_to_json(str(file))
        os.utime(file, (seconds, seconds))
        return state

    mine = written("run-1", float("nan"), 20)
    written("run-2", 2.0, 30)
    written(".", 1.0, 10)
    assert saved_folder([tmp_path], mine) == tmp_path / "run-1/checkpoint-4"
    mine.log_history.append({"note": "by another callback, after the save"})
    assert saved_folder([tmp_path], mine) == tmp_path / "run-2/checkpoint-4", "then the one written last"
    (tmp_path / "run-2/checkpoint-4/trainer_state.json").write_text("{")
    assert saved_folder([tmp_path], mine) == tmp_path / "run-1/checkpoint-4"
    assert saved_folder([tmp_path / "none"], mine) == tmp_path / "none/checkpoint-4"


def test_a_relative_output_dir_and_a_script_that_moves(base, tmp_path, monkeypatch):
    """The guard's files stay where the run began; Trainer's checkpoints follow the script, with ours in them."""
    start, later = tmp_path / "start", tmp_path / "later"
    start.mkdir()
    later.mkdir()
    monkeypatch.chdir(start)

    class Move(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.chdir(later)

    args = arguments(Path("."), max_steps=2, save_steps=1)
    assert not Path(args.output_dir).is_absolute()
    trainer = make_trainer(base, args, Move())
    trainer.add_callback(guard(drift_steps=1))
    trainer.train()
    judge_pair(base, start / "run/checkpoint-1")
    judge_pair(base, later / "run/checkpoint-2")
    assert not (start / "run/checkpoint-2").exists() and not (later / "run/_qkguard").exists()
    final = start / "run/_qkguard/final"
    judge_pair(base, final / "raw", final / "qk_restored")
    assert (final / "raw/model.safetensors").samefile(later / "run/checkpoint-2/model.safetensors")
    rows = [json.loads(line) for line in (start / "run/_qkguard/metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2}
