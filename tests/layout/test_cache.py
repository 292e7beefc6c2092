"""What discovery found is kept for the next command, and asked again when anything it depends on changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qkguard.layout import cache, find_attention
from qkguard.layout.cache import cached as ask
from qkguard.layout.spec_file import dump_specs, parse_specs
from qkguard.offline.pair import folder_attention
from tests.support.models import tiny_model


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QKGUARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_asked_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def find() -> list[int]:
        asked.append(1)
        return [len(asked)]

    assert ask("attention", {"a": 1}, find) == ask("attention", {"a": 1}, find) == [1]
    assert ask("attention", {"a": 2}, find) == [2], "other inputs are another question"
    assert ask("names", {"a": 1}, find) == [3]
    monkeypatch.setattr(cache, "_code", lambda: "another version")
    assert ask("attention", {"a": 1}, find) == [4], "other code is another question"
    monkeypatch.undo()
    monkeypatch.setenv("QKGUARD_CACHE", "")
    assert ask("attention", {"a": 1}, find) == [5], "switched off"


def test_damaged_or_unwritable(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask("attention", 1, lambda: "yes") == "yes"
    (file,) = store.iterdir()
    file.write_text('{"answ')
    assert ask("attention", 1, lambda: "again") == "again"
    assert ask("attention", 1, lambda: "never asked") == "again"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QKGUARD_CACHE", str(tmp_path / "file"))
    assert ask("attention", 1, lambda: "still answers") == "still answers"


def test_an_error_is_not_kept(store: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        ask("attention", 1, lambda: 1 // 0)
    assert ask("attention", 1, lambda: "now") == "now"


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "gpt2", "phi3", "minimax"])
def test_the_same_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(name).save_pretrained(tmp_path / "model")
    found = find_attention(tmp_path / "model")
    assert parse_specs(dump_specs(found), "layout") == found
    assert folder_attention(tmp_path / "model") == found
    monkeypatch.setattr("qkguard.layout.find_attention", lambda *a, **k: pytest.fail("asked again"))
    assert folder_attention(tmp_path / "model") == found
