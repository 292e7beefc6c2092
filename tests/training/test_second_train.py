"""Everything that belongs to one training begins with it: nothing survives into a second `train()`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from qkguard import QKGuardCallback
from tests.support import judge
from tests.support.probing import bpe_tokenizer, no_floor
from tests.support.training import arguments, make_trainer, save_base

PROBES: dict[str, Any] = {"probe_lengths": [192], "probe_depths": 2, "probe_samples": 1, "probe_tasks": ["s1"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    return save_base(folder, "llama", vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256)


@pytest.fixture(autouse=True)
def probed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    no_floor(monkeypatch)


def probed_steps(run: Path, file: str = "metrics.jsonl") -> list[int]:
    rows = [json.loads(line) for line in (run / "_qkguard" / file).read_text().splitlines()]
    return [row["step"] for row in rows if "qkguard/niah/recall" in row]


def trainer_of(base: Path, folder: Path, guard: QKGuardCallback, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    args = arguments(folder, save_strategy="no", **options)
    return make_trainer(base, args, guard, model=model, processing_class=bpe_tokenizer())


def test_a_second_train_of_the_same_length_is_probed_again(base, tmp_path):
    guard = QKGuardCallback(strict=True, probe_budget=1.0, probe_steps=100, **PROBES)
    trainer = trainer_of(base, tmp_path, guard, max_steps=2)
    trainer.train()
    run = tmp_path / "run"
    assert probed_steps(run) == [0, 2]
    first = json.loads((run / "_qkguard/final/qk_restored/qkguard.json").read_text())["probe"]["raw"]
    trainer.train()
    assert probed_steps(run) == [2], (
        "the second training's own metrics; what it is compared with is the first baseline"
    )
    assert probed_steps(run, "metrics-1.jsonl") == [0, 2], "the first training's are kept"
    second = json.loads((run / "_qkguard/final/qk_restored/qkguard.json").read_text())["probe"]["raw"]
    assert second["answer_logprob"] != first["answer_logprob"], "the manifest reports the first training's recall"


def test_the_schedule_is_the_second_trainings_own(base, tmp_path):
    guard = QKGuardCallback(strict=True, probe_budget=None, probe_steps=0.5, **PROBES)
    trainer = trainer_of(base, tmp_path, guard, max_steps=2)
    trainer.train()
    trainer.args.max_steps = 8
    trainer.train()
    assert 4 in probed_steps(tmp_path / "run") and 1 not in probed_steps(tmp_path / "run")


def test_the_reference_is_still_the_first_one(base, tmp_path):
    """What must survive: before SFT means before the first training."""
    guard = QKGuardCallback(strict=True, probe_steps=0)
    trainer = trainer_of(base, tmp_path, guard, max_steps=2)
    trainer.train()
    before = judge.file_sha256(tmp_path / "run/_qkguard/reference.safetensors")
    trainer.train()
    assert judge.file_sha256(tmp_path / "run/_qkguard/reference.safetensors") == before
    rows = judge.metrics_rows(tmp_path / "run")
    assert rows[0]["qkguard/drift/q_rel"] > 1e-3, "drift is still measured from before the first training"
