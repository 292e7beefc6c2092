"""The notebook: its source runs; what is stored is of that source and names nothing of the machine that made it."""

from __future__ import annotations

import importlib.util
import re
import runpy
import socket
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE = EXAMPLES / "from_run_to_choice.py"
SMALLER = {
    "max_steps=60": "max_steps=2",
    "eval_steps=30": "eval_steps=2",
    "drift_steps=5": "drift_steps=1, probe_depths=1, probe_samples=1",
    "probe_steps=30": "probe_steps=1",
    "[256, 512]": "[256]",
    'tasks=["single_2", "multikey_1"]': 'tasks=["single_2"]',
    "methods=grid,": 'methods="restore", depths=1, samples=1,',
}
"""What makes the walk a matter of seconds."""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute_notebook", EXAMPLES / "execute_notebook.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stored(tool: ModuleType) -> Any:
    return nbformat.read(tool.NOTEBOOK, as_version=4)


def texts(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def complaints(notebook: Any) -> list[str]:
    """Code cells that were not run in their order, or that ended in an error."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [cell.id for number, cell in enumerate(code, 1) if cell.execution_count != number]
    return found + [cell.id for cell in code if any(output.output_type == "error" for output in cell.outputs)]


def test_what_is_stored_is_of_the_present_source(tool: ModuleType, stored: Any) -> None:
    source = SOURCE.read_text(encoding="utf-8")
    assert texts(stored) == texts(tool.to_notebook(source)), "`make notebook` runs it again"
    assert texts(stored) != texts(tool.to_notebook(source.replace("max_steps=60", "max_steps=61")))
    assert complaints(stored) == []
    nbformat.validate(stored)


def test_it_shows_drift_the_verdict_and_the_choice(stored: Any) -> None:
    outputs = [output for cell in stored.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "RECOMMENDED: raw" in printed or "RECOMMENDED: qk_restored" in printed
    assert "interpolate" in printed and "Answer:" in printed and "expected: Answer:" in printed
    assert "Traceback" not in printed and "Warning" not in printed


def test_it_names_nothing_of_the_machine(tool: ModuleType, stored: Any, tmp_path: Path) -> None:
    assert tool.private_names(stored, tmp_path) == []

    def found(text: str) -> list[str]:
        notebook = tool.to_notebook("# %%\nprint()\n")
        notebook.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
        return tool.private_names(notebook, tmp_path)

    assert found(f"Wrote {tmp_path}/run.") != []
    assert found("Wrote /home/me/run/_qkguard, as asked") == ["/home/me/run/_qkguard,"]
    assert found(f"on {socket.gethostname()}: 1") == [socket.gethostname()]
    assert found(f"loss 1.0/2, run/_qkguard/tmp/x, https://a.org/home/b, x{socket.gethostname()}") == []


def test_cells_that_failed_or_were_skipped_are_found(tool: ModuleType) -> None:
    notebook = tool.to_notebook("# %% [markdown]\n# # Title\n#\n# text\n\n# %%\na = 1  # %% not a cell\n\n# %%\nb\n")
    assert texts(notebook) == [("markdown", "# Title\n\ntext"), ("code", "a = 1  # %% not a cell"), ("code", "b")]
    assert complaints(notebook) == ["cell-1", "cell-2"]
    notebook.cells[1].execution_count, notebook.cells[2].execution_count = 1, 2
    assert complaints(notebook) == []
    notebook.cells[2].outputs = [nbformat.v4.new_output("error", ename="NameError", evalue="b", traceback=[])]
    assert complaints(notebook) == ["cell-2"]


def test_progress_bars_are_left_out_and_streams_are_whole(tool: ModuleType) -> None:
    pieces = ["one\nLoading:  0%\r", "Loading: 100%\n", "two in /here/run\n"]
    outputs = [nbformat.v4.new_output("stream", name="stderr", text=text) for text in pieces]
    bar = nbformat.v4.new_output("stream", name="stdout", text="10%\r20%\n")
    assert [output.text for output in tool.merged([*outputs, bar], re.compile("/here/"))] == ["one\ntwo in run\n"]


def test_the_source_runs_as_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SOURCE.read_text(encoding="utf-8")
    for long, short in SMALLER.items():
        assert long in source
        source = source.replace(long, short)
    (tmp_path / "walk.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = runpy.run_path("walk.py", run_name="__main__")
    said = capsys.readouterr().out
    assert (tmp_path / "run/_qkguard/final/RECOMMENDED").read_text().strip() in said
    assert (tmp_path / "run/_qkguard/heldout.jsonl").is_file(), "the sweep finds rows of the evaluation set"
    assert {"base", "raw", "restore"} <= {point.name for point in names["report"].points}
    assert names["chosen"] == ("chosen" if names["picked"].recommendable else names["tuned"])


@pytest.mark.slow
def test_the_notebook_executes(tool: ModuleType, tmp_path: Path) -> None:
    made = tool.execute(tool.to_notebook(SOURCE.read_text(encoding="utf-8")), tmp_path)
    assert complaints(made) == []
    test_it_shows_drift_the_verdict_and_the_choice(made)
