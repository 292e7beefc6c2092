"""Every command of the README runs: for real on the demo's model where no hub is needed, the others on stand-ins."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkguard
import qkguard.demo
from docs.what_works import written
from qkguard.demo import DemoSettings
from tests.conftest import Run
from tests.support.lora import LINEAR, save_adapter
from tests.support.zoo import tiny_config

README = Path(__file__).parents[2] / "README.md"
DEMO = Path(qkguard.demo.__file__).parent / "model"
ELSEWHERE = {"make demo", "make test", "pip install qkguard"}  # CI, test_demo_command.py, the wheel
QUICK = {
    "qkguard sweep": shlex.split("--lengths 256 --samples 1 --depths 1 --tasks single_2 --methods restore"),
    "qkguard demo": ["--steps", "2"],
}
KINDS = ("recipes", "sft", "restore", "drift", "inspect", "verify", "demo", "sweep", "merge")


def commands() -> list[str]:
    """Lines of the README's bash blocks, continued lines joined, comments gone."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("  #")[0].split()) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BASE, TUNED, MODEL, ADAPTER, data, and a model and rows to stand in for a recipe's."""
    root = tmp_path_factory.mktemp("readme")
    for name in ("BASE", "TUNED", "MODEL", "qkguard/demo/model"):  # the last as in a clone
        shutil.copytree(DEMO, root / name)
    weights = load_file(root / "TUNED/model.safetensors")
    noise = torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if value.dim() == 2:
            weights[name] = value + 0.02 * torch.randn(value.shape, generator=noise).to(value.dtype)
    save_file(weights, root / "TUNED/model.safetensors", {"format": "pt"})
    save_adapter(root / "BASE", root / "ADAPTER", target_modules=LINEAR)
    row = {"prompt": "m = 3 ; n = m + 1 ; n = ? ", "answer": "4"}
    (root / "heldout.jsonl").write_text(json.dumps(row) + "\n")
    tiny_config("qwen3_5").save_pretrained(root / "qwen3.5")
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, root / "qwen3.5")
    turns = [{"role": "user", "content": "1 + 2 = "}, {"role": "assistant", "content": "3"}]
    (root / "rows.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(20)))
    template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    (root / "qwen3.5/chat_template.jinja").write_text(template)
    return root


def test_all_commands_in_order(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    small = {"lengths": (256,), "depths": 1, "samples": 1, "problems": 2, "batch": 2}
    monkeypatch.setattr(qkguard.demo, "DemoSettings", partial(DemoSettings, **small))
    ran = []
    for command in commands():
        if command in ELSEWHERE or re.fullmatch(r"pip install \S+", command):
            continue
        words = shlex.split(command)
        words = words[re.fullmatch(r"[A-Z_]+=\S+", words[0]) is not None :]  # a setting for this command alone
        assert words[0] == "qkguard", command
        kind = " ".join(words[:2])
        if kind == "qkguard sft":  # the recipe's own model and data are on the hub
            words += ["--model_name_or_path", "qwen3.5", "--dataset_name", "rows.jsonl", "--dry-run"]
            words += ["--num-processes", "2"] if "--accelerate" in words else []
        elif kind in ("qkguard restore", "qkguard merge"):
            words.append("--overwrite")
        elif kind == "qkguard sweep":
            shutil.rmtree("RESTORED", ignore_errors=True)
        code, out, err = run(*words[1:], *QUICK.get(kind, ()))
        raw_is_best = kind == "qkguard sweep" and code == 1 and "raw" in out
        assert code == 0 or raw_is_best, (command, out, err)
        ran.append(kind)
    assert {f"qkguard {kind}" for kind in KINDS} == set(ran)


def test_names_and_keys_exist() -> None:
    text = README.read_text()
    for name in re.findall(r"`qkguard\.(?!json)(\w+)`", text):
        assert hasattr(qkguard, name), name
    for key in re.findall(r"^`?([a-z]\w*)=", text, re.M):
        assert key in qkguard.QKGuardConfig.__dataclass_fields__, key
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (README.parent / path).exists(), path
    assert written(text) == text, "python docs/what_works.py"


def test_the_one_line_is_all_it_takes() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    made = []

    class SFTTrainer:
        def __init__(self, model: object, args: object, train_dataset: object, callbacks: list[object]) -> None:
            made.extend(callbacks)

        def train(self) -> None:
            made.append("trained")

    exec(block, {"SFTTrainer": SFTTrainer})
    assert isinstance(made[0], qkguard.QKGuardCallback) and made[1:] == ["trained"]
