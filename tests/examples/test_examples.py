"""Every script of examples/ runs as it is, in this process; only the guard's probes are made small."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import qkguard
from qkguard.demo import MODEL
from qkguard.training.callback import QKGuardCallback
from tests.support.pictures import small_pictures

EXAMPLES = Path(__file__).parents[2] / "examples"
HERE = {path.stem for path in EXAMPLES.glob("*.py")}
SMALL = {"probe_lengths": [256], "probe_depths": 1, "probe_samples": 1, "probe_tasks": ["single_2"]}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, and a guard with few and short probes that draws nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qkguard, "QKGuardCallback", partial(QKGuardCallback, **SMALL), raising=False)
    monkeypatch.setattr(qkguard, "sweep", partial(short_sweep, qkguard.sweep))
    with small_pictures():
        yield tmp_path


def short_sweep(sweep: Any, *folders: object, **options: Any) -> Any:
    """A sweep of few points, at two lengths, the longer one shortened."""
    lengths = [min(length, 320) for length in options.pop("lengths")]
    return sweep(*folders, **options, lengths=lengths, samples=1, depths=1, methods="restore")


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> dict[str, Any]:
    """What the script leaves in its names."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def queries_moved_back(raw: Path, restored: Path) -> bool:
    """Whether one folder has the tuned queries and the other those of the model that ships with the package."""
    key = next(key for key in load_file(MODEL / "model.safetensors") if "q_proj" in key)
    before, after, back = (load_file(path / "model.safetensors")[key] for path in (MODEL, raw, restored))
    return back.equal(before) and not after.equal(before)


def metrics(run_folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def test_full_fine_tuning_then_restoring_and_choosing(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("full_finetuning", monkeypatch)
    final = small / "out-full/_qkguard/final"
    assert queries_moved_back(final / "raw", final / "qk_restored") and (final / "RECOMMENDED").is_file()
    assert sorted(path.parent.name for path in small.glob("out-full/checkpoint-*/qk_restored")) == [
        "checkpoint-12",
        "checkpoint-6",
    ]
    run("restore_and_choose", monkeypatch)
    said = capsys.readouterr().out
    assert "raw" in said and "layers restored by" in said and "raw files unchanged" in said
    assert (small / "out-chosen/qkguard.json").is_file()


def test_by_arguments_on_another_model_and_rows(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(MODEL, small / "mine")
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(20)]
    (small / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("full_finetuning", monkeypatch, "mine", "rows.jsonl")
    assert metrics(small / "out-full/_qkguard")[-1]["step"] == 15  # three epochs of 18 rows, 4 a step
    run("restore_and_choose", monkeypatch, "mine", "out-full/_qkguard/final/raw", "rows.jsonl")
    assert (small / "out-chosen/qkguard.json").is_file()


def test_lora(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("lora", monkeypatch)
    assert (small / "out-lora/checkpoint-8/qk_restored/default/adapter_model.safetensors").is_file()
    final = small / "out-lora/_qkguard/final"
    assert queries_moved_back(final / "merged_raw", final / "merged_qk_restored")


def test_resume(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(
        qkguard, "QKGuardCallback", lambda: written.append(_stamp(small)) or QKGuardCallback(**SMALL), raising=False
    )
    run("resume", monkeypatch)
    assert written[0] is None and written[1] == _stamp(small), "the reference of the first start is kept"
    steps = [row["step"] for row in metrics(small / "out-resume/_qkguard")]
    assert {1, 5, 6, 8} <= set(steps)
    assert (small / "out-resume/checkpoint-8/qk_restored/qkguard.json").is_file()


def _stamp(folder: Path) -> int | None:
    file = folder / "out-resume/_qkguard/reference.safetensors"
    return file.stat().st_mtime_ns if file.is_file() else None


def test_own_tracker(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("own_tracker", monkeypatch)
    rows = [line.split(",") for line in (small / "guard.csv").read_text().splitlines()]
    drift = [(row[0], float(row[2])) for row in rows if row[1] == "qkguard/drift/q_rel"]
    written = metrics(small / "out-tracker/_qkguard")
    known = {(str(row["step"]), row.get("qkguard/drift/q_rel")) for row in written}
    assert drift and set(drift) <= known
    assert any(row[0] == "end" for row in rows)


def test_own_haystack(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = partial(QKGuardCallback, **SMALL)
    monkeypatch.setattr(qkguard, "QKGuardCallback", lambda haystack, **_: guarded(haystack=haystack), raising=False)
    guard = run("own_haystack", monkeypatch)["guard"]
    prose = guard.session.recall_monitor.prober.maker.prose
    assert prose.origin == "haystack.txt" and prose.sentences[0].startswith("Item 0 of the list")
    assert any("qkguard/niah/recall" in row for row in metrics(small / "out-haystack/_qkguard"))


def test_what_trl_sft_does(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "data").mkdir()
    row = {"prompt": "1 + 2 =", "completion": " 3"}
    (small / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    given = (
        f"--model_name_or_path {MODEL} --dataset_name data --output_dir out --max_steps 2 --use_cpu true --bf16 false"
    )
    run("trl_sft", monkeypatch, *given.split(), "--report_to", "none")
    assert (small / "out/_qkguard/final/qk_restored").is_dir() and (small / "out/model.safetensors").is_file()
    script = (EXAMPLES / "trl_sft.py").read_text()
    assert len([line for line in script.split('"""')[2].splitlines() if line]) <= 10, "ten lines, says the page"


@pytest.mark.slow
def test_two_nodes(tmp_path: Path) -> None:
    """Two torchrun agents that meet as two hosts do, a rank each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    nodes = [
        subprocess.Popen(
            [*command, f"--node-rank={node}", str(EXAMPLES / "two_nodes.py")],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    said = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(text[-3000:] for text in said)
    assert "restored: out-two-nodes/_qkguard/final/qk_restored" in said[0] and "restored:" not in said[1]
    final = tmp_path / "out-two-nodes/_qkguard/final"
    assert queries_moved_back(final / "raw", final / "qk_restored")


def test_every_example_has_its_test() -> None:
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    assert {name for name in HERE if f'"{name}"' not in source and f'"{name}.py"' not in source} == set()
