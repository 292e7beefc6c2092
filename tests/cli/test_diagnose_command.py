"""`qkguard diagnose` and `qkguard sft --dry-run --diagnose` as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_sft_command import DEMO, recipe
from tests.conftest import Run
from tests.offline.test_diagnose import data
from tests.support.zoo import tiny_model

__all__ = ["data", "recipe"]  # fixtures


def test_tables_files_and_json(run: Run, data: Path, tmp_path: Path) -> None:
    prose = data.parent / "prose.txt"
    common = ["diagnose", "--model", DEMO, "--data", data, "--rows", 4, "--far", 8, "--no-heads"]
    code, out, err = run(*common, "--against", prose, "--out", tmp_path / "out", "--png", tmp_path / "a.png")
    assert code == 0, err
    assert "prose: W_grad" in out and "These are measurements, not a forecast" in out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        f"diagnosis.{kind}" for kind in ("json", "html", "png")
    }
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(*common, "--json")
    values = json.loads(out)
    assert code == 0 and values["prose"] is None and values["data"]["rows"] == 4
    assert values["data"]["w_grad"] == json.loads((tmp_path / "out/diagnosis.json").read_text())["data"]["w_grad"]


def test_text_files_are_data_too(run: Run, data: Path) -> None:
    prose = data.parent / "prose.txt"
    code, out, err = run("diagnose", "-m", DEMO, "-d", prose, "--rows", 3, "--max-length", 60, "--no-heads", "--json")
    assert code == 0, err
    found = json.loads(out)["data"]
    assert (found["rows"], found["tokens"]) == (3, 180) and found["scored_tokens"] == 3 * 59


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "no/such/folder"], "no such folder"),
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--against", "none.txt"], "none.txt: no such file"),
        (["--rows", "0"], "'--rows'"),
        (["--dtype", "int3"], "dtype 'int3'"),
        (["--png", "no/such/a.png"], "there is no folder"),
        (["--max-length", "8"], "first 8 tokens of every row"),
    ],
)
def test_mistakes_cost_one_line(run: Run, data: Path, args: list[str], message: str) -> None:
    code, out, err = run("diagnose", "--model", DEMO, "--data", data, *args)
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1 and message in err


def test_a_type_that_cannot_be_followed_costs_one_line(run: Run, data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = tiny_model("bloom", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "bloom")  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / "bloom")
    code, _, err = run("diagnose", "--model", tmp_path / "bloom", "--data", data)
    assert code == 2 and "BloomForCausalLM cannot be diagnosed" in err and len(err.strip().splitlines()) == 1


def test_in_a_dry_run(run: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("The road was empty and the night was cold. " * 30)
    line = ["sft", "--config", recipe, "--dry-run", "--diagnose"]
    code, out, err = run(*line, "--against", tmp_path / "prose.txt", "--json")
    assert code == 0, err
    plan = json.loads(out)
    found = plan["diagnosis"]
    assert found["settings"]["max_length"] == plan["data"]["max_length"] == 64
    assert found["data"]["rows"] == 21 and found["prose"] is not None and not (tmp_path / "run").exists()
    code, out, _ = run(*line)
    assert code == 0 and "softmax-attention layers" in out and "W_grad" in out and "Nothing was trained" in out
    for wrong in ([*line[:3], "--diagnose"], [*line[:4], "--against", tmp_path / "prose.txt"]):
        code, _, err = run(*wrong)
        assert code == 2 and "add --dry-run --diagnose" in err
