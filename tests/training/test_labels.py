"""Every number carries the step of the weights it is from, and schedules do not depend on one another."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from qkguard import QKGuardCallback
from qkguard.report.run import load_run
from qkguard.training import metrics_log
from qkguard.training.trackers import STEP, Tracker
from tests.support import judge
from tests.support.probing import bpe_tokenizer, no_floor
from tests.support.training import arguments, make_trainer, save_base, token_rows, train
from tests.training.test_trackers import records, wandb_run

PROBES: dict[str, Any] = {"probe_lengths": [192], "probe_depths": 2, "probe_samples": 1, "probe_tasks": ["s1"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    return save_base(folder, "llama", vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256)


def train_to_best(base: Path, folder: Path, guard: QKGuardCallback, load_best: bool = True, **options: Any) -> Any:
    """Three steps, each evaluated and saved, of which an invented score makes the second one the best."""
    scores = iter([1.0, 3.0, 2.0])
    args = arguments(
        folder,
        TrainingArguments,
        **{"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": load_best}
        | {"metric_for_best_model": "score", "greater_is_better": True}
        | options,
    )
    rows = token_rows(4).map(lambda r: {"input_ids": r["input_ids"][:12], "labels": r["input_ids"][:12]})
    trainer = make_trainer(
        base,
        args,
        guard,
        eval_dataset=rows,
        processing_class=bpe_tokenizer(),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    return trainer


class Recording(Tracker):
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.summaries: dict[str, float] = {}

    def scalars(self, metrics, step):
        self.rows.append((step, dict(metrics)))

    def summary(self, values):
        self.summaries |= values


def sent_twice(rows: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, str]]:
    counts = Counter((step, key) for step, row in rows for key in row)
    return [place for place, count in counts.items() if count > 1]


def is_of(trainer: Any, checkpoint: Path) -> bool:
    held = judge.weights_in_bits(checkpoint)
    live = {name: tensor.numpy().tobytes() for name, tensor in trainer.model.state_dict().items()}
    return all(held[name] == live[name] for name in held.keys() & live.keys())


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "qk_restored/qkguard.json").read_text())


def test_the_final_numbers_carry_the_best_step(base, tmp_path, monkeypatch):
    no_floor(monkeypatch)
    tracker, run = Recording(), tmp_path / "run"
    monkeypatch.setattr(metrics_log, "open_trackers", lambda *args: [tracker])
    guard = QKGuardCallback(strict=True, probe_steps=1, probe_budget=None, routing_drift_steps=1, **PROBES)
    trainer = train_to_best(base, tmp_path, guard)
    assert is_of(trainer, run / "checkpoint-2") and not is_of(trainer, run / "checkpoint-3")

    manifest = manifest_of(run / "_qkguard/final")
    assert manifest["step"] == manifest["drift"]["step"] == manifest["drift"]["routing_step"] == 2
    assert manifest["probe"]["raw"]["step"] == manifest["probe"]["restored"]["step"] == 2
    rows = judge.metrics_rows(run)
    for key in ("qkguard/drift/q_rel", "qkguard/drift/routing_rel", "qkguard/niah/answer_logprob"):
        values = [(row["step"], row[key]) for row in rows if key in row]
        assert values[-1] in values[:-1] and values[-1][0] == 2, "measured again, with what step 2 had"
        assert values[-1][1] != values[-2][1] and values[-2][0] == 3
    assert rows[-1]["step"] == 2
    last = [row for row in rows if "qkguard/drift/q_rel" in row][-1]
    for layer, value in judge.drift_by_layer("llama", "q", base, run / "checkpoint-2", torch.float32).items():
        assert last[f"qkguard/drift/layer_{layer}/q_rel"] == pytest.approx(value, rel=1e-6)
    assert (run / "_qkguard/final/raw/model.safetensors").samefile(run / "checkpoint-2/model.safetensors")

    assert sent_twice([(row["step"], row) for row in rows]), "in the file they are twice"
    assert not sent_twice(tracker.rows)
    assert {step for step, _ in tracker.rows} == {0, 1, 2, 3}
    assert tracker.summaries["q_rel"] == last["qkguard/drift/q_rel"]

    guard.save(trainer, tmp_path / "saved")
    assert manifest_of(tmp_path / "saved")["step"] == 2
    read = load_run(run)
    assert [step for step, _ in read.series("qkguard/drift/q_rel")] == [1, 2, 3]
    assert (
        read.last_value("qkguard/drift/q_rel")
        == last["qkguard/drift/q_rel"]
        != read.series("qkguard/drift/q_rel")[-1][1]
    )
    assert read.probe_of("raw").step == 2


def test_without_reloading_they_carry_the_last_step(base, tmp_path):
    guard = QKGuardCallback(strict=True, probe_steps=0)
    trainer = train_to_best(base, tmp_path, guard, load_best=False)
    run = tmp_path / "run"
    assert is_of(trainer, run / "checkpoint-3")
    assert manifest_of(run / "_qkguard/final")["step"] == judge.metrics_rows(run)[-1]["step"] == 3
    guard.save(trainer, tmp_path / "saved")
    assert manifest_of(tmp_path / "saved")["step"] == 3


def test_a_best_checkpoint_that_was_never_loaded(base, tmp_path):
    """Trainer goes on with the last weights where no checkpoint was the best one when it was saved."""
    guard = QKGuardCallback(strict=True, probe_steps=0)
    trainer = train_to_best(base, tmp_path, guard, save_steps=3)
    assert trainer.state.best_model_checkpoint is None and trainer.state.best_global_step == 2
    assert manifest_of(tmp_path / "run/_qkguard/final")["step"] == 3


def test_a_further_training_forgets_the_best_step(base, tmp_path):
    guard = QKGuardCallback(strict=True, probe_steps=0)
    trainer = train_to_best(base, tmp_path, guard)
    trainer.args.load_best_model_at_end, trainer.args.eval_strategy = False, "no"
    trainer.train()
    assert manifest_of(tmp_path / "run/checkpoint-1")["step"] == 1
    assert manifest_of(tmp_path / "run/_qkguard/final")["step"] == 3


def test_wandb_gets_every_metric_once_for_a_step(base, tmp_path, monkeypatch):
    with wandb_run(tmp_path / "wandb", monkeypatch) as file:
        guard = QKGuardCallback(strict=True, probe_steps=0)
        train_to_best(base, tmp_path, guard, report_to=["wandb"], run_name="r")
    rows = [(int(row[STEP]), row) for kind, row in records(file()) if kind == "history" and STEP in row]
    ours = [(step, {key: 0 for key in row if key.startswith("qkguard/")}) for step, row in rows]
    assert {step for step, row in ours if "qkguard/drift/q_rel" in row} == {1, 2, 3}
    assert not sent_twice(ours)


# -- schedules -------------------------------------------------------------------------------------------------------


def measured(run: Path, key: str) -> list[int]:
    return [row["step"] for row in judge.metrics_rows(run) if f"qkguard/drift/{key}" in row]


@pytest.mark.parametrize(
    ("drift", "routing", "drift_at", "routing_at"),
    [
        (0, "logging", [], [12, 24, 24]),
        (9, "logging", [9, 18, 24], [12, 24, 24]),
        ("logging", 9, [12, 24, 24], [9, 18, 24]),
        ("logging", 0, [12, 24, 24], []),
    ],
)
def test_epoch_logging(base, tmp_path, drift, routing, drift_at, routing_at):
    options: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4}
    args = arguments(tmp_path, logging_strategy="epoch", save_strategy="no", **options)
    guard = QKGuardCallback(
        strict=True, probe_steps=0, final_export=False, drift_steps=drift, routing_drift_steps=routing
    )
    trainer = train(base, args, guard)
    assert trainer.state.max_steps == 24
    assert measured(tmp_path / "run", "q_rel") == drift_at
    assert measured(tmp_path / "run", "routing_rel") == routing_at


def test_schedules_in_steps(base, tmp_path):
    guard = QKGuardCallback(strict=True, probe_steps=0, drift_steps=2, routing_drift_steps=3)
    train(base, arguments(tmp_path, max_steps=4, save_steps=3), guard)
    assert measured(tmp_path / "run", "q_rel") == [2, 4, 4]
    assert measured(tmp_path / "run", "routing_rel") == [3, 4]
    saved = manifest_of(tmp_path / "run/checkpoint-3")
    assert (saved["step"], saved["drift"]["step"], saved["drift"]["routing_step"]) == (3, 2, 3)
