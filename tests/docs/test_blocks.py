"""Every code block of the README and the pages runs: Python as it stands, commands in this process on stand-ins.

What needs a GPU, a download or another package says so in a comment that readers do not see, and is parsed.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer
import yaml

import qkguard
from docs.command_line import reference
from qkguard import QKGuardConfig
from qkguard.cli import app
from tests.conftest import Run
from tests.support.demos import make_small
from tests.support.pages import ROOT, Block, blocks, blocks_of, commands_in, read
from tests.support.stand_ins import guarded_run, make_stand_ins

LANGUAGES = {"python", "bash", "yaml", "json", "text"}
SMALLER = {
    r"max_steps=\d+": "max_steps=1",
    r"save_steps=\d+": "save_steps=1",
    r"lengths=\(1024, 4096\)": 'lengths=(256,), tasks=("single_2",), depths=1, samples=1',
    r"QKGuardCallback\(\)": "QKGuardCallback(probe_lengths=[256], probe_depths=2, probe_samples=1, probe_budget=None)",
}
"""What makes a page's training a matter of seconds."""
QUICK = {
    "qkguard sweep": "--lengths 256 --samples 1 --depths 1 --tasks single_2 --methods restore",
    "qkguard demo": "--steps 1",
    "qkguard probe": "--lengths 256 --samples 1 --depths 1 --tasks single_2",
    "qkguard diagnose": "--rows 2 --no-heads",
    "qkguard restore": "--overwrite",
    "qkguard merge": "--overwrite",
    # a recipe's own model and data are on the hub
    "qkguard sft": "--model_name_or_path qwen3.5 --dataset_name rows.jsonl --dry-run",
}
OTHERS = {"accelerate", "axolotl", "cat", "cd", "export", "git", "hf", "llamafactory-cli", "swift", "torchrun", "trl"}
"""Programs that pages may name beside qkguard, python, pip and make."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of all blocks."""
    root = make_stand_ins(tmp_path_factory.mktemp("blocks"))
    guarded_run(root / "runs/first", steps=1)
    shutil.copytree(root / "runs/first", root / "runs/second")
    shutil.copy(ROOT / "recipes/qwen3/cot-sft/full.yaml", root / "mine.yaml")
    shutil.copytree(ROOT / "recipes/accelerate_configs", root / "recipes/accelerate_configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        make_small(patch)
        yield root


class StandInTrainer:
    """Takes what pages give an `SFTTrainer` of which they show one line alone."""

    made: ClassVar[list[StandInTrainer]] = []

    def __init__(self, *args: object, callbacks: list[object], **options: object) -> None:
        self.callbacks, self.trained = callbacks, False
        StandInTrainer.made.append(self)

    def train(self) -> None:
        self.trained = True


def same_text_once(found: list[Block]) -> list[Block]:
    return list({block.text: block for block in found}.values())


def command_blocks() -> list[tuple[Block, str]]:
    """Every command once, whatever it sets in its environment, those that only have to parse included."""
    found = [*blocks("bash"), *blocks_of("cli.md", reference())]
    listed = [(block, command) for block in found if block.language == "bash" for command in commands_in(block.text)]
    return list({(bare(command), block.only_parsed): (block, command) for block, command in listed}.values())


def bare(command: str) -> str:
    """A command without a setting for it alone, such as A=1."""
    return re.sub(r"^[A-Z_]+=\S+ ", "", command)


def test_every_block_says_its_language() -> None:
    assert [str(block) for block in blocks() if block.language not in LANGUAGES] == []
    assert {"python", "bash", "yaml"} <= {block.language for block in blocks()}


@pytest.mark.parametrize("block", same_text_once(blocks("python")), ids=str)
def test_python_runs(block: Block, place: Path) -> None:
    tree = ast.parse(block.text)
    if block.only_parsed:
        names = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        for node in (node for node in names if node.module.split(".")[0] == "qkguard"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        return
    text = block.text
    for pattern, smaller in SMALLER.items():
        text = re.sub(pattern, smaller, text)
    StandInTrainer.made.clear()
    exec(compile(text, str(block), "exec"), {"SFTTrainer": StandInTrainer, "__name__": "__main__"})
    for trainer in StandInTrainer.made:
        assert any(isinstance(found, qkguard.QKGuardCallback) for found in trainer.callbacks) and trainer.trained


@pytest.mark.parametrize(("block", "command"), command_blocks(), ids=str)
def test_commands_run(block: Block, command: str, place: Path, run: Run) -> None:
    words = shlex.split(bare(command))
    if words[0] != "qkguard":
        assert is_known(words), command
    elif block.only_parsed or block.page == "cli.md":
        parse(words[1:])
    else:
        run_for_real(words, place, run)


def run_for_real(words: list[str], place: Path, run: Run) -> None:
    """A command on stand-ins, with options that make it quick."""
    kind = " ".join(words[:2])
    words = [*words, *shlex.split(QUICK.get(kind, ""))]
    if kind == "qkguard sft" and "--accelerate" in words:
        words += ["--num-processes", "2"]
    if kind == "qkguard verify" and not (place / words[-1]).exists():  # what a page's earlier command has written
        parse(words[1:])
        assert run("restore", "--base", "BASE", "--tuned", "TUNED", "--out", words[-1])[0] == 0
    if kind == "qkguard recipes" and "--to" in words:
        Path(words[words.index("--to") + 1]).unlink(missing_ok=True)
    if kind == "qkguard sweep":
        shutil.rmtree("RESTORED", ignore_errors=True)
    code, out, err = run(*words[1:])
    raw_is_best = kind == "qkguard sweep" and code == 1 and "raw" in out
    assert code == 0 or raw_is_best, (words, out, err)
    if raw_is_best:  # later commands of the page go on with it
        assert run("restore", "--base", "BASE", "--tuned", "TUNED", "--out", "RESTORED")[0] == 0


def is_known(words: list[str]) -> bool:
    """Whether another program than qkguard is one that pages name, with files that exist."""
    program = words[0]
    if program == "accelerate" and "--config_file" in words:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file(), words
    if program == "make":
        return all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in words[1:])
    if program.endswith("python") and words[1] == "-m":
        return words[2] in ("pip", "pytest", "http.server", "build") or importlib.util.find_spec(words[2]) is not None
    if program.endswith("python"):
        options = {word for word in words[2:] if word.startswith("--")}
        return words[1] == "sft.py" or takes(read(words[1]), options)
    return program == "pip" or program in OTHERS


def takes(script: str, options: set[str]) -> bool:
    """Whether a script names these options, or leaves them to TRL's parser."""
    return "TrlParser" in script or all(f'"{option}"' in script for option in options)


def parse(words: list[str]) -> None:
    """Have the command line parse these words; it raises at a command or an option that is not known."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("qkguard", list(words), resilient_parsing=False)
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else list(context.args)
        if not rest:
            return
        command = command.commands[rest[0]]
        context = command.make_context(rest[0], rest[1:], parent=context)


@pytest.mark.parametrize("block", same_text_once(blocks("yaml")), ids=str)
def test_yaml_is_settings(block: Block) -> None:
    found = yaml.safe_load(block.text)
    assert isinstance(found, dict)
    if "qkguard" in found:
        QKGuardConfig(**found["qkguard"])
    if not block.only_parsed:
        known = {"env", "qkguard", *all_keys()}
        assert sorted(set(found) - known) == []


def all_keys() -> list[str]:
    """What a recipe takes beside the guard's section."""
    from trl import ModelConfig, SFTConfig

    from qkguard.sft.data import DataArguments

    return [field.name for kind in (DataArguments, SFTConfig, ModelConfig) for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_json(block: Block) -> None:
    for line in block.text.splitlines() if block.text.startswith("{") and "}\n{" in block.text else [block.text]:
        json.loads(line)


@pytest.mark.parametrize(
    ("words", "message"), [("sweeep --base B", "sweeep"), ("restore --base B --tuned T --out O --rigde 1", "rigde")]
)
def test_a_wrong_command_is_found(words: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        parse(words.split())
    assert not is_known(["nonsense"]) and not is_known(["make", "nonsense"])


def test_a_comment_keeps_a_block_from_running() -> None:
    text = "<!-- only parsed: needs a GPU -->\n```bash\nqkguard demo\n```\n\n    ```python\n    a = 1\n    ```\n"
    first, second = blocks_of("page", text)
    assert (first.only_parsed, second.only_parsed, second.text) == ("needs a GPU", "", "a = 1\n")
    assert commands_in("a \\\n  b  # c\n\n# d\ne#f\n") == ["a b", "e#f"]
