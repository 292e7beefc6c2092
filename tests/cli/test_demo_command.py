"""`qkguard demo` as typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from qkguard import cli
from tests.support.demos import SMALL, make_small


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["qkguard", "demo", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_it_ends_with_the_table_the_verdict_and_the_next_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a demo"
    assert run(monkeypatch, "--out", out, "--steps", 2) == 0
    text, errors = capfd.readouterr()
    for words in (
        "before SFT",
        "after SFT (raw)",
        "restored (",
        "needle recall, 256 tokens",
        "chains of thought right",
    ):
        assert words in text
    assert "chosen for the effect" in text and "recipes/amnesia-lab" in text
    assert "recall while it trained: 1.00 at step 0" in text
    assert text.index("chains of thought right") < text.index("Recommended: ") < text.index("done in")
    assert f"    '{out}/_qkguard/report.html'\n" in text and "qkguard restore --base BASE --tuned TUNED" in text
    assert "Warning" not in errors and "it/s" not in text + errors  # nothing but our own lines
    assert (out / "demo.png").is_file() and (out / "_qkguard/report.html").is_file()

    assert run(monkeypatch, "--out", out, "--steps", 2, "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert set(report["scores"]) == {"before", "raw", "qk_restored"}
    settings = report["settings"] | {name: tuple(report["settings"][name]) for name in ("lengths", "tasks")}
    assert settings.items() >= SMALL.items(), "the tests run at the size that users do"
    assert run_verify(monkeypatch, report["files"]["restored"]) == 0


def test_it_goes_to_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert run(monkeypatch, "--out", tmp_path / "demo", "--steps", 2, "--wandb") == 0
    import wandb

    file = Path(wandb.run.settings.sync_file)  # in one process, wandb keeps to the folder of its first run
    wandb.finish()
    data = file.read_bytes()
    assert b"qkguard/niah/recall" in data and b"train/loss" in data


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", no_gpu)
    (tmp_path / "mine.txt").write_text("mine")
    new = tmp_path / "new"
    for args in (("--out", tmp_path), ("--out", new, "--steps", 0), ("--out", new, "--gpu")):
        assert run(monkeypatch, *args) == 2
        assert capfd.readouterr().err.startswith("error: ")
    assert not new.exists()


def run_verify(monkeypatch: pytest.MonkeyPatch, folder: str) -> int:
    monkeypatch.setattr(sys, "argv", ["qkguard", "verify", "--full", folder])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def no_gpu() -> bool:
    return False
