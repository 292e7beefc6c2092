"""Rows held out from SFT are those of the tuned folder's own run, never of a run that happens to be near."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qkguard.errors import QKGuardError
from qkguard.offline.sweep import sweep
from qkguard.offline.task_rows import find_rows
from qkguard.report.run import load_run


def guarded_run(run_folder: Path) -> Path:
    """The files of a guarded run as far as rows and reports go by them; returns the held-out rows."""
    run_folder.mkdir(parents=True)
    (run_folder / "metrics.jsonl").write_text('{"step": 3, "qkguard/drift/q_rel": 0.5}\n')
    rows = run_folder / "heldout.jsonl"
    rows.write_text('{"text": "kept"}\n')
    return rows


def model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    return folder


def restored(folder: Path, reference: Path | None) -> Path:
    base: dict[str, Any] = {"id": "base"} if reference is None else {"id": "base", "reference": str(reference)}
    (model(folder) / "qkguard.json").write_text(json.dumps({"format": 1, "base": base}))
    return folder


@pytest.mark.parametrize(
    "place",
    [
        ".",
        "checkpoint-3",
        "checkpoint-3/raw",
        "checkpoint-3/qk_restored/default",
        "_qkguard/final/raw",
        "_qkguard/final/qk_restored/default",
        "_qkguard/final/merged_raw",
    ],
)
def test_a_runs_own_models(place, tmp_path):
    rows = guarded_run(tmp_path / "run/_qkguard")
    assert find_rows(model(tmp_path / "run" / place)) == rows
    (tmp_path / "link").symlink_to(tmp_path / "run" / place)
    assert find_rows(tmp_path / "link") == rows
    rows.unlink()
    assert find_rows(tmp_path / "run" / place) is None


@pytest.mark.parametrize(
    "place",
    ["other", "models/other", "run-1/checkpoint-3", "_qkguard/superseded/final/raw", "../other", "../checkpoint-3"],
)
def test_models_that_only_lie_around(place, tmp_path):
    guarded_run(tmp_path / "run/_qkguard")
    assert find_rows(model(tmp_path / "run" / place)) is None


def test_a_hub_id_has_no_run(tmp_path, monkeypatch):
    """Also where the working directory is a run, or a folder two levels below one."""
    guarded_run(tmp_path / "run/_qkguard")
    (tmp_path / "run/checkpoint-3").mkdir()
    for folder in ("run", "run/checkpoint-3"):
        monkeypatch.chdir(tmp_path / folder)
        assert find_rows(Path("some/hub-id")) is None
        with pytest.raises(QKGuardError, match=r"no data .* lies in no guarded run .*--data"):
            sweep("base", "some/hub-id")


def test_trials_of_a_hyperparameter_search(tmp_path):
    rows = guarded_run(tmp_path / "run/_qkguard")
    checkpoint = model(tmp_path / "run/trial/checkpoint-3")
    for search in (False, True):
        (checkpoint / "trainer_state.json").write_text(json.dumps({"is_hyper_param_search": search}))
        assert find_rows(checkpoint) == find_rows(model(checkpoint / "qk_restored")) == (rows if search else None)


def test_a_manifest_names_the_run(tmp_path):
    """Models of `guard.save`, and those of a run whose own folder lies elsewhere."""
    rows = guarded_run(tmp_path / "guard")
    for folder in ("saved", "run/checkpoint-3"):
        raw = model(tmp_path / folder)
        assert find_rows(raw) is None
        restored(raw / "qk_restored", tmp_path / "gone/reference.safetensors")
        assert find_rows(raw) is None
        made = restored(raw / "qk_restored", tmp_path / "guard/reference.safetensors")
        assert find_rows(raw) == find_rows(made) == rows
    assert find_rows(model(tmp_path / "guard/final/raw")) == rows


def test_a_report_shows_no_other_runs_checkpoints(tmp_path):
    guarded_run(tmp_path / "guard")
    for step, owner in ((1, "guard"), (2, "another"), (3, None)):
        reference = tmp_path / owner / "reference.safetensors" if owner else None
        restored(tmp_path / f"checkpoint-{step}/qk_restored", reference)
    assert load_run(tmp_path / "guard").restored_folders == [tmp_path / "checkpoint-1/qk_restored"]
    (tmp_path / "guard").rename(tmp_path / "_qkguard")
    assert len(load_run(tmp_path).restored_folders) == 3, "by place, in a run's own output folder"
