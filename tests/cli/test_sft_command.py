"""`qkguard sft` as typed: a whole training, the plan that comes true, and one line for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import qkguard.demo
from tests.conftest import Run
from tests.support import judge
from tests.support.zoo import tiny_config

DEMO = Path(qkguard.demo.__file__).parent / "model"
RECIPE = """
model_name_or_path: {model}
dtype: float32
output_dir: {out}
dataset_name: {rows}
learning_rate: 1e-3
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
max_length: 64
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {{min_lr_rate: 0.1}}
bf16: false
logging_steps: 1
save_strategy: epoch
disable_tqdm: true
report_to: none
qkguard:
  probe_lengths: [256]
  probe_depths: 1
  probe_samples: 1
  probe_tasks: [single_1]
  probe_steps: 3
  probe_budget: null
"""


def rows_file(path: Path, row: dict[str, Any] | None = None, count: int = 21) -> Path:
    row = row or {"prompt": "1 + 2 = ", "completion": "3 . so 3"}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    rows = rows_file(tmp_path / "rows.jsonl")
    file.write_text(RECIPE.format(model=DEMO, out=tmp_path / "run", rows=rows))
    return file


def test_a_training_and_the_plan_that_comes_true(run: Run, recipe: Path, tmp_path: Path) -> None:
    code, out, err = run("sft", "--config", recipe, "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert not (tmp_path / "run").exists()
    text = run("sft", "--config", recipe, "--dry-run")[1]
    assert "2 softmax-attention layers (2, 5)" in text and plan["files"]["reference"] in text

    code, out, err = run("sft", "--config", recipe, "--learning_rate", "5e-4", "--qkguard.restore_on=save")
    assert code == 0, err
    done = tmp_path / "run"
    state = json.loads((done / f"checkpoint-{plan['data']['steps']}" / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == plan["data"]["steps"] == 6  # 21 rows, 4 a step
    assert state["log_history"][0]["learning_rate"] == 5e-4  # the command line wins over the recipe
    with safe_open(plan["files"]["reference"], "pt") as file:
        held = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert sum(t.numel() * t.element_size() for t in held) == plan["guard"]["reference_bytes"]
    assert len(held) == plan["guard"]["parameters"]
    recalls = [row["step"] for row in judge.metrics_rows(done) if "qkguard/niah/recall" in row]
    assert recalls == [0, plan["probes"]["every"], 6] and plan["probes"]["count"] == 1
    assert f"qkguard verify {plan['files']['final']}/qk_restored" in out
    assert run("verify", "--full", Path(plan["files"]["final"]) / "qk_restored")[0] == 0
    assert run("verify", plan["files"]["restored"].replace("-N", "-6"))[0] == 0

    code, _, err = run("sft", "--config", recipe, "--model_name_or_path", done / "checkpoint-6")
    assert code == 2 and "not the model before SFT" in err  # a checkpoint of a guarded run is no base


def test_adapters(run: Run, recipe: Path, tmp_path: Path) -> None:
    arguments = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--lora_dropout", "0", "--lora_r", "4"]
    code, out, _ = run("sft", "--config", recipe, "--dry-run", "--json", *arguments)
    plan = json.loads(out)
    assert code == 0 and plan["model"]["trained"] == 2 * (4 * (192 + 192) + 4 * (192 + 96))  # 2 layers, A and B
    assert not plan["probes"]["off"] and plan["guard"]["reference_bytes"] == 0
    assert run("sft", "--config", recipe, "--max_steps", 1, *arguments)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "run/_qkguard/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "qkguard/niah/recall" in row] == [0, 1]
    adapter = tmp_path / "run/checkpoint-1/qk_restored/default"
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names and all("v_proj" in name for name in names)


def test_resuming_and_evaluating(run: Run, recipe: Path, tmp_path: Path) -> None:
    arguments = ["--save_strategy", "steps", "--save_steps", 1, "--qkguard.probe_steps", 0]
    held_out = rows_file(tmp_path / "test.jsonl", {"prompt": "2 + 2 = ", "completion": "4"})
    arguments += ["--eval_strategy", "steps", "--eval_steps", 1, "--dataset_test_split", held_out]
    assert run("sft", "--config", recipe, "--max_steps", 2, *arguments)[0] == 0
    reference = judge.file_sha256(tmp_path / "run/_qkguard/reference.safetensors")
    code, _, err = run("sft", "--config", recipe, "--max_steps", 3, *arguments, "--resume_from_checkpoint", "true")
    assert code == 0, err
    state = json.loads((tmp_path / "run/checkpoint-3/trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "loss" in row] == [1, 2, 3]
    assert [row["step"] for row in state["log_history"] if "eval_loss" in row] == [1, 2, 3]
    assert judge.file_sha256(tmp_path / "run/_qkguard/reference.safetensors") == reference  # never taken again
    assert run("verify", "--full", tmp_path / "run/checkpoint-3/qk_restored")[0] == 0


def model_folder(folder: Path, model_type: str, **config: Any) -> Path:
    tiny_config(model_type, **config).save_pretrained(folder)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_mistakes_are_one_line(run: Run, recipe: Path, tmp_path: Path) -> None:
    kimi, mamba = (model_folder(tmp_path / kind, kind) for kind in ("kimi_linear", "mamba"))
    chat = rows_file(tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": "1"}]})
    other = rows_file(tmp_path / "other.jsonl", {"question": "1", "text": "2"})
    mistakes: list[tuple[list[object], str]] = [
        (["--learning_rat", 1], "Unknown key --learning_rat: did you mean --learning_rate?"),
        (["--qkguard.probe_depth", 1], "did you mean --qkguard.probe_depths?"),
        (["--probe_steps", 1], "did you mean --qkguard.probe_steps?"),
        (["--method", "restore"], "did you mean --qkguard.method?"),
        (["--zzz", 1], "Unknown key --zzz: no known key resembles it."),
        (["stray"], "Unexpected argument 'stray'"),
        (["--learning_rate", "fast"], "learning_rate: invalid float value: 'fast'"),
        (
            ["--qkguard.restore_on", "often"],
            'Invalid restore_on=\'often\': expected "save", "best", "end" or "never".',
        ),
        (["--dtype", "bf17"], "invalid choice: 'bf17'"),
        (["--prompt_column", "question"], "has the columns prompt, completion, and no 'question' (prompt_column)"),
        (["--dataset_name", other], "has the columns question, text; expected messages, prompt and completion, or"),
        (["--dataset_name", tmp_path / "nix.jsonl"], "nix.jsonl does not exist"),
        (["--dataset_name", chat], "has no chat template"),
        (["--model_name_or_path", mamba], "no softmax attention"),
        (["--model_name_or_path", tmp_path / "nix"], "nix"),
        (["--model_name_or_path", kimi, "--packing"], "Packing would mix samples in kimi_linear"),
        (["--packing"], "Packing would mix samples in minimax"),
        (["--use_peft", "--lora_target_modules", "nix_proj"], "The adapter does not fit"),
        (["--qkguard.probe_lengths", 20], "Probe length 20 is too short"),
        (["--eval_strategy", "epoch"], "name their split with dataset_test_split"),
        (["--datasets", "[]"], "dataset_name and datasets are both given"),
        (["--accelerate", "zero3", "--num-processes", 1], "--accelerate zero3 spreads a model over several processes"),
        (["--accelerate", "zero4"], "neither a bundled config"),
        (["--accelerate", "single", "--num-processes", 2], "--accelerate single runs one process"),
        (["--num-processes", 2], "add --accelerate"),
    ]
    for arguments, said in mistakes:
        code, _, err = run("sft", "--config", recipe, "--dry-run", *arguments)
        assert code == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1, (arguments, err)
    code, _, err = run("sft", "--config", recipe, "--eos_token", "<nix>", "--qkguard.probe_steps", 0)
    assert code == 2 and "refuses these settings: The specified `eos_token`" in err
    code, _, err = run("sft", "--config", recipe, "--accelerate", "ddp", "--nodes", 2, "--num-processes", 1)
    assert code == 2 and "--nodes 2 needs --main-process-ip" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("max_length:", "max_lenght:"), "recipe.yaml: Unknown key max_lenght: did you mean max_length?"),
        (("  probe_depths:", "  probes_depth:"), "did you mean qkguard.probe_depths?"),
        (("bf16: false", "probe_depths: 2"), "qkguard.probe_depths? In a recipe it goes into the section `qkguard:`"),
        (("bf16: false", "max_length: 32"), "recipe.yaml: 'max_length' is given twice, the second time in line 13"),
        (("max_length: 64", "max_length: long"), "recipe.yaml: max_length: invalid int value: 'long'"),
        (("max_length: 64", "max_length: [64]"), "max_length: expected one value, found [64]"),
        (("learning_rate: 1e-3", "learning_rate:"), "learning_rate has no value"),
        (("dtype: float32", "dtype: bf17"), "invalid choice: 'bf17'"),
        (("output_dir:", "run_name:"), "output_dir is missing"),
        (("dataset_name:", "run_name:"), "dataset_name is missing"),
        (("model_name_or_path:", "run_name:"), "model_name_or_path is missing"),
        (("bf16: false", "bf16: [a"), "is not valid YAML"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(run: Run, recipe: Path, change: tuple[str, str], said: str) -> None:
    recipe.write_text(recipe.read_text().replace(*change))
    code, _, err = run("sft", "--config", recipe, "--dry-run")
    assert code == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1, err


def test_a_short_max_length_warns_with_the_share_it_cuts(run: Run, recipe: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    long = {"prompt": "1 + 2 = ", "completion": "3 " * 80}
    rows.write_text(rows.read_text() + "".join(json.dumps(long) + "\n" for _ in range(7)))
    code, _, err = run("sft", "--config", recipe, "--dry-run")
    assert code == 0 and "max_length=64 cuts 25% of the samples (7 of 28 looked at" in err
    assert "cuts" not in run("sft", "--config", recipe, "--dry-run", "--max_length", 128)[2]


def test_a_bare_config_is_enough_for_a_plan(run: Run, recipe: Path, tmp_path: Path) -> None:
    tiny_config("qwen3_next").save_pretrained(tmp_path / "bare")
    for model in (tmp_path / "bare", tmp_path / "bare" / "config.json"):
        code, out, err = run("sft", "--config", recipe, "--dry-run", "--json", "--model_name_or_path", model)
        assert code == 0 and "has no tokenizer" in out, err
        assert json.loads(out)["guard"]["layers"] == [3]


def launched(recipe: Path, accelerate: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qkguard", "sft", "--config", str(recipe), "--accelerate", accelerate]
    command += [*(["--num-processes", "2"] if accelerate != "single" else []), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


def test_two_ranks_from_one_command(recipe: Path, tmp_path: Path, run: Run) -> None:
    done = launched(recipe, "zero3", "--max_steps", "2", "--qkguard.probe_steps", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "KB of it on this rank" in done.stderr or "MB of it on this rank" in done.stderr  # sharded over two
    assert run("verify", "--full", tmp_path / "run/_qkguard/final/qk_restored")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("accelerate", ["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_every_accelerate_config_from_one_command(recipe: Path, tmp_path: Path, run: Run, accelerate: str) -> None:
    done = launched(recipe, accelerate, "--max_steps", "2", "--qkguard.probe_steps", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert run("verify", "--full", tmp_path / "run/_qkguard/final/qk_restored")[0] == 0
    assert ("trains these processes as DDP" in done.stderr) == (accelerate == "fsdp2")


@pytest.mark.gpu
@pytest.mark.parametrize("accelerate", ["single", "single,lora", "ddp", "zero3", "zero3,lora", "fsdp2"])
def test_on_accelerators(recipe: Path, tmp_path: Path, run: Run, accelerate: str) -> None:
    """All local accelerators, in bfloat16, with probes; needs two of them for anything but `single`."""
    name, _, adapter = accelerate.partition(",")
    arguments = ["--max_steps", "2", "--bf16", "true", "--qkguard.strict", "--qkguard.probe_steps", "1"]
    arguments += ["--dtype", "bfloat16"] if name in ("zero3", "fsdp2") or adapter else []
    if adapter:
        arguments += ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--lora_dropout", "0"]
    command = [sys.executable, "-m", "qkguard", "sft", "--config", str(recipe), "--accelerate", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    final = tmp_path / "run/_qkguard/final/qk_restored"
    assert run("verify", "--full", final)[0] == 0 or (adapter and (final / "default").is_dir())
    recalls = [row["step"] for row in judge.metrics_rows(tmp_path / "run") if "qkguard/niah/recall" in row]
    assert recalls == ([] if adapter else [0, 1, 2])
