"""`qkguard demo` as typed."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from qkguard import cli, demo


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same path with a handful of samples."""
    settings = partial(demo.DemoSettings, lengths=(256,), depths=1, samples=1, tasks=("s2",), problems=2, batch=2)
    monkeypatch.setattr(demo, "DemoSettings", settings)


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["qkguard", "demo", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_it_ends_with_the_table_the_files_and_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a demo"
    assert run(monkeypatch, "--out", out, "--steps", 2) == 0
    text, errors = capfd.readouterr()
    for words in ("before SFT", "after SFT (raw)", "QK-restored", "needle recall, 256 tokens", "CoT accuracy"):
        assert words in text
    assert f"qkguard verify --full '{out}/_qkguard/final/qk_restored'" in text
    assert f"--tuned '{out}/_qkguard/final/raw' --data '{out}/heldout.jsonl'" in text
    assert "Warning" not in errors and "it/s" not in text + errors  # nothing but our own lines
    assert (out / "drift.png").is_file() and (out / "heldout.jsonl").is_file()

    assert run(monkeypatch, "--out", out, "--steps", 2, "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert set(report["scores"]) == {"before", "raw", "qk_restored"}
    assert run_verify(monkeypatch, report["files"]["restored"]) == 0
    assert run_verify(monkeypatch, report["files"]["raw"]) == 2


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for args in (("--out", tmp_path), ("--out", tmp_path / "new", "--steps", 0)):
        assert run(monkeypatch, *args) == 2
        assert capfd.readouterr().err.startswith("error: ")
    assert not (tmp_path / "new").exists()


def run_verify(monkeypatch: pytest.MonkeyPatch, folder: str) -> int:
    monkeypatch.setattr(sys, "argv", ["qkguard", "verify", "--full", folder])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)
