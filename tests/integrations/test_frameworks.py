"""A guarded training in each framework's own hands, with what docs/frameworks.md says to add.

`make test-integrations` makes the environments and runs these.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.integrations.environments import ENVIRONMENTS, ROOT
from tests.integrations.framework_cases import EVERY, STEPS
from tests.integrations.page import PAGE, blocks
from tests.support.models import tiny_model
from tests.support.probing import CHATML, bpe_tokenizer

QUERIES_AND_KEYS = ("q_proj", "k_proj")


def smaller(text: str) -> str:
    """The page's settings, restored models at every save and shorter probes."""
    assert "restore_on: end" in text and "[1024, 4096]" in text
    return text.replace("restore_on: end", "restore_on: save").replace("[1024, 4096]", "[256]")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer, and rows of two turns."""
    root = tmp_path_factory.mktemp("frameworks")
    tokenizer = bpe_tokenizer(CHATML)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512, **ids)
    model.save_pretrained(root / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(root / "model")
    said = [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(6) for b in range(4)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in said]
    (root / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in turns))
    return root


@pytest.mark.integrations
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_guarded_training(name: str, place: Path, tmp_path: Path) -> None:
    environment = ENVIRONMENTS[name]
    if not environment.python.is_file():
        pytest.skip(f"python tests/integrations/environments.py {name}")
    out = tmp_path / "out"
    given = {
        "model": str(place / "model"),
        "rows": str(place / "rows.jsonl"),
        "out": str(out),
        "folder": str(tmp_path),
    }
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if name == "axolotl":
        given["added"] = smaller(blocks("axolotl", "yaml")[0])
    elif name == "ms-swift":
        given["added"] = swift_words(given, environment.python, variables)
        exported = blocks("ms-swift", "bash")[2].splitlines()[1]
        variables["QKGUARD_SETTINGS"] = smaller(shlex.split(exported)[1].partition("=")[2])
    elif name == "llamafactory":
        given["added"] = smaller(blocks("LLaMA-Factory", "yaml")[0])
        command = shlex.split(blocks("LLaMA-Factory", "bash")[1].splitlines()[0])
        assert command[:2] == ["python", "-m"]
        given["command"] = command[2:]
    said = run_case(name, environment.python, given, variables)
    assert "The run's page: " in said  # the guard's lines are seen, whatever the framework does with others'
    check_run(place / "model", out)
    if name == "unsloth":
        run_case("unsloth-patches", environment.python, given, variables)
        check_adapters(tmp_path / "out-lora")


def run_case(name: str, python: Path, given: dict[str, Any], variables: dict[str, str]) -> str:
    """What the case printed."""
    folder = Path(given["folder"])
    (folder / "given.json").write_text(json.dumps(given))
    command = [python, "-m", "tests.integrations.framework_cases", name, folder / "given.json"]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def check_adapters(out: Path) -> None:
    """Both saves have an adapter without queries and keys beside the raw one."""
    for step in range(EVERY, STEPS + 1, EVERY):
        raw = load_file(out / f"checkpoint-{step}" / "adapter_model.safetensors")
        restored = load_file(out / f"checkpoint-{step}" / "qk_restored" / "default" / "adapter_model.safetensors")
        tuned = {name for name in raw if re.search("|".join(QUERIES_AND_KEYS), name)}
        assert tuned and raw.keys() - tuned == restored.keys()
        assert all(tensor.equal(raw[name]) for name, tensor in restored.items())
        assert all(raw[name].any() for name in tuned if "lora_B" in name)  # the twin: training has moved them


def swift_words(given: dict[str, str], python: Path, variables: dict[str, str]) -> list[str]:
    """The arguments of the page's `swift sft`, the tiny model's in place of its own."""
    command = blocks("ms-swift", "bash")[1].replace("\\\n", " ")
    asked = [python, "-m", "qkguard", "integrations", "ms-swift"]
    file = subprocess.run(asked, env=variables, capture_output=True, text=True, check=True).stdout.strip()
    command = command.replace("$(qkguard integrations ms-swift)", file)
    for mine, theirs in (
        ("Qwen/Qwen3-8B", given["model"]),
        ("rows.jsonl", given["rows"]),
        (" out ", f" {given['out']} "),
    ):
        assert mine in command
        command = command.replace(mine, theirs)
    words = shlex.split(command)
    assert words[:2] == ["swift", "sft"]
    return words[2:]


def check_run(base: Path, out: Path) -> None:
    """Both saves have their restored model, and the run its page, metrics and final models."""
    before = load_file(base / "model.safetensors")
    for step in range(EVERY, STEPS + 1, EVERY):
        raw = load_file(out / f"checkpoint-{step}" / "model.safetensors")
        restored = load_file(out / f"checkpoint-{step}" / "qk_restored" / "model.safetensors")
        assert raw.keys() == restored.keys()
        for name, tensor in restored.items():
            source, other = (before, raw) if re.search("|".join(QUERIES_AND_KEYS), name) else (raw, before)
            assert tensor.equal(source[name].to(tensor.dtype)), name
            if "proj" in name:  # the twin: training has moved it
                assert not tensor.equal(other[name].to(tensor.dtype)), name
    rows = [json.loads(line) for line in (out / "_qkguard" / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("qkguard/drift/q_rel", 0) for row in rows) > 0
    assert any("qkguard/niah/recall" in row for row in rows)
    assert (out / "_qkguard" / "report.html").is_file() and (out / "_qkguard" / "final" / "qk_restored").is_dir()


def test_the_page_names_the_versions_that_are_tested() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = {
        name.lower(): found for name, found in re.findall(r"^\| \[([\w-]+)\]\(#[\w-]+\) \| ([\d.]+) \|", text, re.M)
    }
    wanted = {env.name: env.framework.partition("==")[2] for env in ENVIRONMENTS.values()}
    assert rows == {name.replace("llamafactory", "llama-factory"): version for name, version in wanted.items()}
