"""Commands that only move or compare bytes run without torch and transformers, once a config's layout is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkguard.errors import QKGuardError
from qkguard.offline.restore import restore_checkpoint
from qkguard.sft.arguments import parse
from tests.support.models import save_pair
from tests.support.quantised import quantise

RUN = """
import contextlib, io, json, sys
from qkguard.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["qkguard", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    brought = sorted({"torch", "transformers"} & set(sys.modules))
    print(json.dumps([code, out.getvalue(), err.getvalue(), brought]))
"""


class Ran(NamedTuple):
    """What a command did, and which of torch and transformers its process had imported after it."""

    code: int
    out: str
    err: str
    brought: list[str]


def run_all(*commands: Sequence[object]) -> list[Ran]:
    """Commands one after the other in a fresh process."""
    asked = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", RUN, asked], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return [Ran(*json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("pair"), "llama", dtype=torch.bfloat16, shard="60KB")


@pytest.fixture
def known(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A restored folder; making it has left the layout in the cache."""
    monkeypatch.setenv("QKGUARD_CACHE", str(tmp_path / "cache"))
    restore_checkpoint(*pair, tmp_path / "known")
    return tmp_path / "known"


def test_what_moves_bytes_does_without(pair: tuple[Path, Path], known: Path, tmp_path: Path) -> None:
    base, tuned = pair
    sides = ["--base", base, "--tuned", tuned]
    run = tmp_path / "run"
    (run / "_qkguard").mkdir(parents=True)
    row = {"step": 1, "qkguard/drift/q_rel": 0.25, "qkguard/niah/recall": 0.5}
    (run / "_qkguard/metrics.jsonl").write_text(json.dumps(row))
    commands: list[Sequence[object]] = [
        ["restore", *sides, "--out", tmp_path / "out", "--json"],
        ["drift", *sides, "--json"],
        ["verify", known, "--full"],
        ["report", run],
        ["recipes", "--json"],
        ["recipes", "show", "qwen3/cot-sft/full"],
        ["integrations"],
        ["integrations", "ms-swift"],
        ["integrations", "axolotl"],
        # the twin: what computes brings torch, and it would be seen
        ["restore", *sides, "--out", tmp_path / "half", "--method", "interpolate", "--alpha", "0.5", "--json"],
    ]
    *found, computed = run_all(*commands)
    assert [(ran.code, ran.brought) for ran in found] == [(0, [])] * 9, found
    assert computed.code == 0 and "torch" in computed.brought
    for file in known.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert Path(found[7].out.strip()).is_file() and "--external_plugins" in found[6].out
    plugin = "plugins: [qkguard.integrations.axolotl.QKGuardPlugin]"  # what is in brackets is text
    assert plugin in found[6].out and plugin in found[8].out
    assert json.loads(found[1].out)["mean"]["routing_rel"] > 0
    assert (run / "_qkguard/report.html").stat().st_size > 1000 and len(json.loads(found[4].out)["recipes"]) > 3


def test_quantised_bases_and_carried_tensors_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKGUARD_CACHE", str(tmp_path / "cache"))
    base, tuned = save_pair(tmp_path, "llama", dtype=torch.bfloat16)
    tensors = load_file(base / "model.safetensors") | {"mtp.up_proj.weight": torch.ones(64, 64).bfloat16()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    quantise(base, "fp8 blocks")
    restore_checkpoint(base, tuned, tmp_path / "known", carry_missing=True)
    sides = ["--base", base, "--tuned", tuned]
    found = run_all(
        ["restore", *sides, "--out", tmp_path / "out", "--carry-missing", "--json"],
        ["drift", *sides, "--json"],
        ["verify", tmp_path / "known", "--full"],
    )
    assert [(ran.code, ran.brought) for ran in found] == [(0, [])] * 3, found
    assert len(list((tmp_path / "known").glob("*.safetensors"))) == 2
    for file in (tmp_path / "known").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


COMMANDS = ["", "restore", "drift", "verify", "report", "recipes", "sft", "sweep", "probe", "merge", "inspect", "demo"]
COMMANDS += ["integrations"]
HELP: list[Sequence[object]] = [[*command.split(), "--help"] for command in COMMANDS]

REFUSED = [
    ("restore --base /none --tuned /none --out /none/out", "no such folder: /none"),
    ("restore --base {base} --tuned {tuned} --out out --method undo", "unknown restore method 'undo'"),
    ("restore --base {base} --tuned {base} --out out", "same folder"),
    ("drift --base /none --tuned /none", "no such folder: /none"),
    ("drift --base {base} --tuned {tuned} --layers one", "--layers"),
    ("verify /none", "no such folder: /none"),
    ("report /none", "no such folder"),
    ("recipes show none", "none"),
    (
        "integrations none",
        "Unknown framework 'none'; expected axolotl, ms-swift, llama-factory, trl, ",
    ),
    ("merge --base {base} --adapter /none --out out", "no such folder: /none"),
    ("merge --base {base} --adapter {tuned} --out out", "adapter_config.json"),
    ("merge --base {base} --adapter {tuned} --out {base}", "is or contains"),
    ("sweep --base {base} --tuned /none --data none", "no such folder: /none"),
    ("sweep --base {base} --tuned {tuned} --data /none.jsonl", "/none.jsonl: no such file"),
    ("sweep --base {base} --tuned {tuned} --data none --grid undo", "unknown restore method 'undo'"),
    ("sweep --base {base} --tuned {tuned} --data none --controls x", "Unknown control 'x'"),
    ("sweep --base {base} --tuned {tuned} --data none --tasks single_9", "single_9"),
    ("sweep --base {base} --tuned {tuned} --data none --write {base}", "is or contains"),
    ("sweep --base {base} --tuned {tuned} --data none --layers 99", "no softmax attention"),
    ("sweep --base {base} --tuned {tuned} --data none --tolerance -1", "Invalid tolerance"),
    ("probe {base} /none", "no such folder: /none"),
    ("probe {base} {base}/..", "no config.json"),
    ("probe {base} --tasks single_9", "single_9"),
    ("probe {base} --depths 2,3", "depths"),
    ("probe {base} --haystack /none.txt", "/none.txt: no such file"),
    ("probe {base} --prompts /none.jsonl", "/none.jsonl: no such file"),
    ("probe {base} --dtype int8", "--dtype"),
    ("sft --dataset_name d", "model_name_or_path is missing"),
    ("sft --config none", "none is neither a file nor a bundled recipe"),
    ("sft --model_name_or_path m --output_dir o --qkguard.probe_samples no", "probe_samples"),
]


def test_helps_and_refusals_do_without(pair: tuple[Path, Path], known: Path) -> None:
    base, tuned = pair
    typed = [command.format(base=base, tuned=tuned).split() for command, _ in REFUSED]
    found = run_all(*HELP, *typed)
    for ran in found[: len(HELP)]:
        assert (ran.code, ran.brought) == (0, []) and "Usage" in ran.out
    for ran, (command, said) in zip(found[len(HELP) :], REFUSED, strict=True):
        assert (ran.code, ran.out, ran.brought) == (2, "", []) and said.lower() in ran.err.lower(), (command, ran)


def test_a_wrong_key_of_a_training(tmp_path: Path) -> None:
    """The very first one too, and in the words of the parser itself."""
    needed = ["--model_name_or_path", "m", "--output_dir", str(tmp_path / "run")]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rte: 1e-5\n")
    wrong: list[tuple[list[str], Any]] = [
        ([*needed, "--learning_rte", "1e-5"], None),
        (needed, recipe),
        ([*needed, "--qkguard.probe_lenghts", "[256, 512]"], None),
        ([*needed, "--qkguard.probe_samples", "none"], None),
        (needed[2:], None),
    ]
    said = []
    for arguments, file in wrong:
        with pytest.raises(QKGuardError) as refused:
            parse(arguments, file)
        said.append(str(refused.value))
    assert "did you mean --learning_rate?" in said[0] and "recipe.yaml: " in said[1]
    typed = [["sft", *arguments, *(["--config", file] if file else [])] for arguments, file in wrong]
    right = ["sft", *needed, "--learning-rate", "1e-5", "--no_gradient_checkpointing", "--dry-run"]
    *found, last = run_all(*typed, right)
    for ran, sentence in zip(found, said, strict=True):
        assert (ran.code, ran.brought, ran.err.strip()) == (2, [], f"error: {sentence}")
    assert last.code == 2 and "torch" in last.brought, "right keys go on to TRL"
