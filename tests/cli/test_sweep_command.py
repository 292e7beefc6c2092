"""`qkguard restore --method` and `qkguard sweep` as typed: output, files, exit codes, one line for every mistake."""

from __future__ import annotations

import json
import re
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkguard.demo import MODEL
from qkguard.demo.arithmetic import problems
from qkguard.offline.restore import restore_checkpoint
from tests.conftest import Run
from tests.support import judge
from tests.support.models import save_pair
from tests.support.oracle import differences, load_folder

SMALL = ("--lengths", "256", "--depths", "5", "--samples", "2", "--tasks", "S2", "--device", "cpu")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """The demo's model with other queries, and task rows beside it."""
    folder = tmp_path / "tuned"
    shutil.copytree(MODEL, folder)
    random = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith(("q_proj.weight", "k_proj.weight"))]:
        noise = 3 * weights[name].float().std() * torch.randn(weights[name].shape, generator=random)
        weights[name] = (weights[name].float() + noise).half()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows = [{"prompt": chain.prompt, "answer": chain.completion} for chain in islice(problems(seed=3), 8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def one_line(code: int, out: str, err: str) -> str:
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_restore_with_a_method(tmp_path: Path, run: Run) -> None:
    base, tuned = save_pair(tmp_path, "qwen3", dtype=torch.bfloat16, shard="60KB")
    pair = ("--base", base, "--tuned", tuned)
    args = ("--method", "qk-pro", "--ridge", "0.5", "--per-layer", "1=2,3=0")
    code, text, err = run("restore", *pair, "--out", tmp_path / "pro", *args)
    assert (code, err) == (0, "")
    assert "drift by SFT, queries" in text and "qk-pro, queries written: mean distance" in text
    options = {"method": "qk-pro", "ridge": 0.5, "per_layer": {1: 2.0, 3: 0.0}}
    manifest = restore_checkpoint(base, tuned, tmp_path / "api", **options)  # type: ignore[arg-type]
    assert differences(load_folder(tmp_path / "pro"), load_folder(tmp_path / "api")) == []
    assert [layer["ridge"] for layer in manifest["layers"]] == [0.5, 2.0, 0.5, 0.0]
    before, now = (re.search(r"keys written: mean distance (\S+) from before SFT, (\S+) from", text) or "00").groups()  # type: ignore[union-attr]
    assert float(before) == 0 < float(now)

    code, text, err = run(
        "restore", *pair, "--out", tmp_path / "mix", "--method", "interpolate", "--alpha", ".5", "--align"
    )
    assert code == 0 and err.startswith(
        "warning: interpolate fell back in layer(s) 0, 1, 2, 3 to unaligned: the gains"
    )
    assert run("verify", tmp_path / "mix", "--full")[0] == 0
    assert differences(load_folder(tmp_path / "mix"), load_folder(tmp_path / "pro")) != []

    for wrong, message in (
        (("--method", "average"), "Unknown restore method 'average'"),
        (("--alpha", "0.5"), "alpha=0.5 has no effect with method 'restore'"),
        (("--method", "interpolate", "--alpha", "2"), "expected a number from 0 (tuned) to 1"),
        (("--method", "qk-pro", "--projections", "q"), "queries and keys together"),
        (("--method", "qk-pro", "--per-layer", "3:1"), "expected layers and values such as 3=0.5,7=1."),
        (("--method", "qk-pro", "--per-layer", "9=1"), "per_layer names layers [9]"),
        (("--method", "qk-pro", "--device", "nowhere"), "does no float64 arithmetic"),
    ):
        assert message in one_line(*run("restore", *pair, "--out", tmp_path / "bad", *wrong))
    assert not (tmp_path / "bad").exists()


def test_sweep_recommends_and_writes(tuned: Path, tmp_path: Path, run: Run) -> None:
    pair = ("--base", MODEL, "--tuned", tuned, "--data", tmp_path / "rows.jsonl", *SMALL)
    grid = ("--methods", "restore,interpolate:alpha=0.5")
    code, text, err = run(
        "sweep",
        *pair,
        *grid,
        "--controls",
        "k",
        "--each-layer",
        "--attribute",
        "--out",
        tmp_path / "sweep",
        "--write",
        tmp_path / "out",
    )
    assert (code, err) == (0, "")
    judge.no_private_paths(tmp_path / "out")
    assert "Recommended: restore." in text and "rule: highest recall" in text and "layer 5 alone" in text
    assert re.search(r"^restore +1\.000 .*recommended, Pareto$", text, re.M)
    assert "Is it queries and keys? Yes: taken back alone" in text and "MLPs, experts and routers" in text
    report = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [p["name"] for p in report["points"]] == [
        *("base", "raw", "restore", "interpolate alpha 0.5", "K only", "layer 2", "layer 5")
    ]
    points = {p["name"]: p for p in report["points"]}
    assert report["metric"] == "accuracy" and report["recommended"] == "restore"
    assert report["attribution"]["cause"] == ["qk"] and len(report["attribution"]["groups"]) == 5
    assert points["restore"]["recall"] == points["base"]["recall"] != points["raw"]["recall"]
    assert points["restore"]["task"]["accuracy"] == points["base"]["task"]["accuracy"]
    assert (tmp_path / "sweep/sweep.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "sweep/sweep.html").read_text()
    assert (
        "Recommended: restore." in page
        and "data:image/png;base64" in page
        and '<tr class="marked"><td>restore' in page
    )
    assert differences(load_folder(tmp_path / "out"), load_folder(MODEL)) == [], "only Q and K had been changed"
    assert run("verify", tmp_path / "out")[0] == 0

    code, text, err = run("sweep", *pair, *grid, "--controls", "k", "--each-layer", "--json")
    again = json.loads(text)
    assert (code, err) == (0, "") and again["written"] is None
    keys = ("points", "recommended", "words", "layers", "settings")
    assert {k: again[k] for k in keys} == {k: report[k] for k in keys}


def test_sweep_that_recommends_raw_writes_nothing(tuned: Path, tmp_path: Path, run: Run) -> None:
    code, text, err = run(
        *("sweep", "--base", tuned, "--tuned", MODEL, "--data", "none", *SMALL),  # "SFT" that repaired the recall
        *(
            "--methods",
            "restore",
            "--write",
            tmp_path / "out",
            "--png",
            tmp_path / "a.png",
            "--html",
            tmp_path / "a.html",
        ),
    )
    assert (code, err) == (1, "") and "Recommended: raw." in text and not (tmp_path / "out").exists()
    assert "SFT cost no recall" in text and "accuracy" not in text
    assert (tmp_path / "a.png").is_file() and (tmp_path / "a.html").is_file()


def test_mistakes_are_one_line(tuned: Path, tmp_path: Path, run: Run) -> None:
    pair = ("sweep", "--base", MODEL, "--tuned", tuned)
    rows = ("--data", tmp_path / "rows.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"question": 1}')
    for args, message in (
        ((), "no data to measure task quality on: the tuned checkpoint lies in no guarded run"),
        (("--data", tmp_path / "none.jsonl"), "no such file"),
        (("--data", tmp_path / "bad.jsonl"), "Row 1 has the keys question; expected rows with"),
        ((*rows, "--methods", "best"), "Unknown restore method 'best'"),
        ((*rows, "--grid", "interpolate:alpha=3"), "from 0 (tuned) to 1"),
        ((*rows, "--controls", "x"), "Unknown control 'x': expected some of q, k, v, o, vo, or all"),
        ((*rows, "--tolerance", "-1"), "tolerance=-1.0"),
        ((*rows, "--samples", "0"), "'--samples'"),
        ((*rows, "--lengths", "much"), "expected token counts such as 512,4096,32K."),
        ((*rows, "--html", tmp_path / "no" / "a.html"), "there is no folder"),
        ((*rows, "--write", tuned), "is or contains"),
        ((*rows, "--layers", "retrieval"), "--methods restore:layers=retrieval"),
        ((*rows, "--layers", "0"), "Layers [0] have no softmax attention; those that have it: 2, 5"),
    ):
        assert message in one_line(*run(*pair, *args))
    assert "--tuned" in one_line(*run("sweep", "--base", MODEL))
