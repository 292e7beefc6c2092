"""Every file under recipes/ parses strictly and dry-runs on a tiny model of its type; its header says what is true."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import qkguard.demo
from qkguard.sft.arguments import parse
from qkguard.sft.recipes import find_recipe, recipe_names, recipes_folder
from tests.conftest import Run
from tests.layout.test_discover import HYPENET, JET_NEMOTRON
from tests.support.zoo import tiny_config

DEMO = Path(qkguard.demo.__file__).parent / "model"
# family -> (model type of its checkpoint, nominal billions of parameters)
FAMILIES = {
    "falcon-h1": ("falcon_h1", 7.6),
    "granite-4-h": ("granitemoehybrid", 7),
    "kimi-linear": ("kimi_linear", 48),
    "lfm2": ("lfm2", 2.6),
    "minimax": ("minimax", 456),
    "nemotron-3-nano": ("nemotron_h", 32),
    "olmo-hybrid": ("olmo_hybrid", 7),
    "qwen3": ("qwen3", 8.2),
    "qwen3-next": ("qwen3_next", 80),
    "qwen3.5": ("qwen3_5", 4),
    "qwen3.5-moe": ("qwen3_5_moe", 35),
    "smollm2": ("llama", 0.135),
    "smollm3": ("smollm3", 3.1),
}
LAYER_TYPES = {"lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}}
THOUGHT = {"deepseek_thinking_trajectory": "1 + 2 = 3", "deepseek_attempt": "3"}
TURNS = [("user", "human", "1 + 2 = "), ("assistant", "gpt", "3")]
# data set -> a row with the columns it has on the hub
ROWS: dict[str, dict[str, Any]] = {
    "simplescaling/s1K-1.1": {"solution": "3", "question": "1 + 2 = ", "cot_type": "math", "metadata": "{}"} | THOUGHT,
    "open-r1/Mixture-of-Thoughts": {
        "messages": [{"role": role, "content": text} for role, _, text in TURNS],
        "num_tokens": 7,
        "source": "x",
    },
    "open-thoughts/OpenThoughts3-1.2M": {
        "difficulty": 9,
        "source": "x",
        "domain": "math",
        "conversations": [{"from": role, "value": text} for _, role, text in TURNS],
    },
    "openai/gsm8k": {"question": "1 + 2 = ", "answer": "3"},
}
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
YAMLS = sorted(p for p in recipes_folder().rglob("*.yaml") if p.parent.name != "accelerate_configs")
NAMES = sorted(recipe_names())


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with config and tokenizer for every family, a file of rows for every data set."""
    root = tmp_path_factory.mktemp("models")
    files = {}
    for family, (model_type, _) in FAMILIES.items():
        folder = root / family
        tiny_config(model_type, **LAYER_TYPES.get(model_type, {})).save_pretrained(folder)
        for file in DEMO.glob("tokenizer*"):
            shutil.copy(file, folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        files[family] = folder
    for name, row in ROWS.items():
        files[name] = root / f"{name.replace('/', '-')}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for _ in range(50)))
    return files


def header(recipe: Path) -> dict[str, list[str]]:
    """Label -> commands (or lines) of a recipe's opening comment, continued lines joined."""
    text = recipe.read_text().split("\n\n", 1)[0].replace("\\\n#", "")
    parts: dict[str, list[str]] = {}
    label = ""
    for line in text.splitlines()[2:]:
        label = line[2:13].strip() or label
        parts.setdefault(label, []).append(" ".join(line[13:].split()))
    return parts


def replaced(recipe: Path, stand_ins: dict[str, Path]) -> list[str]:
    """Arguments that put a tiny model and local rows in the place of what a recipe downloads."""
    family = recipe.relative_to(recipes_folder()).parts[0]
    data = stand_ins[yaml.safe_load(recipe.read_text())["dataset_name"]]
    return ["--model_name_or_path", str(stand_ins[family]), "--dataset_name", str(data)]


def test_every_yaml_is_a_recipe_of_a_known_family() -> None:
    assert sorted(recipe_names().values()) == YAMLS and len(YAMLS) == 2 * len(FAMILIES)
    assert {p.relative_to(recipes_folder()).parts[0] for p in YAMLS} == set(FAMILIES)
    assert {p.stem for p in YAMLS} == {"full", "lora"}


@pytest.mark.parametrize("name", NAMES)
def test_it_dry_runs_on_a_tiny_model_of_its_type(name: str, run: Run, stand_ins: dict[str, Path]) -> None:
    recipe = find_recipe(name)
    (command,) = header(recipe)["Dry run"]
    words = shlex.split(command.replace("FIRST_NODE", "10.0.0.1"))
    assert words[:4] == ["qkguard", "sft", "--config", name]
    code, out, err = run(*words[1:], "--json", *replaced(recipe, stand_ins))
    assert code == 0, err
    plan = json.loads(out)
    model_type, _ = FAMILIES[name.split("/")[0]]
    assert plan["model"]["type"] in (model_type, f"{model_type}_text")
    assert plan["guard"]["layers"] and plan["guard"]["elements"] > 0
    assert plan["model"]["adapter"] == name.endswith("lora")
    assert (
        plan["model"]["trained"] > 0
        and (plan["model"]["trained"] == plan["model"]["parameters"]) != (plan["model"]["adapter"])
    )
    assert plan["data"]["rows"] == 50 and plan["data"]["tokens"]["longest"] < 100
    gpus = re.search(r"(?:(\d+) nodes? of )?(\d+) GPUs?", header(recipe)["Hardware"][0])
    if gpus:  # the memory line's divisor and the dry run's processes are the hardware line's GPUs
        assert plan["processes"] == int(gpus[1] or 1) * int(gpus[2])


@pytest.mark.parametrize("name", NAMES)
def test_its_header_is_true(name: str, run: Run, stand_ins: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = find_recipe(name)
    values, said = yaml.safe_load(recipe.read_text()), header(recipe)
    assert said["Download"] == [
        f"hf download {values['model_name_or_path']}",
        f"hf download --repo-type dataset {values['dataset_name']}",
    ]
    billions, size, divisor, result = re.search(
        r"([\d.]+) B (?:frozen )?parameters x (\d+) bytes.*?(?:/ (\d+) )?= ([\d.]+) GB", " ".join(said["Memory"])
    ).groups()  # type: ignore[union-attr]
    assert float(billions) == FAMILIES[name.split("/")[0]][1]
    assert float(result) == pytest.approx(float(billions) * int(size) / int(divisor or 1), rel=0.05)
    text = recipe.read_text()
    assert ("# Hyperparameters: " in text and "packing" in text) or name.startswith("smollm2")

    started: list[list[str]] = []
    monkeypatch.setattr(os, "execvpe", lambda file, command, environment: started.append(command))
    monkeypatch.setattr("qkguard.sft.train.train", lambda settings: started.append([str(settings.output_dir)]))
    monkeypatch.setattr("qkguard.sft.preflight.preflight", lambda settings: None)
    (launch,) = said["Launch"]
    override = shlex.split(said["Override"][0].removeprefix("add "))
    words = shlex.split(launch.replace("FIRST_NODE", "10.0.0.1").replace("RANK", "1"))[1:]
    if "--accelerate" in words and "single" not in words:
        words += ["--num-processes", "8"]
    code, _, err = run(*words, *override)
    assert code == 0, err
    assert len(started) == 1  # the launcher, or the training itself
    assert override[-1] in started[0][-1]


def test_recipes_are_listed_shown_and_copied(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("recipes")
    assert code == 0 and all(name in out for name in NAMES)
    code, out, _ = run("recipes", "--json")
    listed = {entry["name"]: entry["about"] for entry in json.loads(out)["recipes"]}
    assert sorted(listed) == NAMES and "full fine-tuning" in listed["qwen3/cot-sft/full"]

    file = find_recipe("qwen3/cot-sft/full")
    assert run("recipes", "show", "qwen3/cot-sft/full")[1] == file.read_text()
    mine = tmp_path / "mine.yaml"
    code, out, _ = run("recipes", "copy", "qwen3/cot-sft/full", "--to", mine)
    assert code == 0 and mine.read_text() == file.read_text() and f"--config {mine} --dry-run" in out
    for words in (["copy", "qwen3/cot-sft/full", "--to", mine], ["show", "qwen3/cot-sft/ful"], ["copy", "nix"]):
        code, _, err = run("recipes", *words)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert "did you mean qwen3/cot-sft/full?" in run("recipes", "show", "qwen3/cot-sft/ful")[2]


def test_a_misspelt_key_in_any_recipe_would_be_caught(
    run: Run, tmp_path: Path, stand_ins: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = find_recipe("smollm2/cot-sft/full").read_text()
    for old, new, meant in (
        ("learning_rate:", "learning_rat:", "learning_rate"),
        ("  probe_depths:", "  probe_depth:", "qkguard.probe_depths"),
        ("problem_column:", "problem_colum:", "problem_column"),
    ):
        wrong = tmp_path / "wrong.yaml"
        wrong.write_text(text.replace(old, new))
        code, _, err = run("sft", "--config", wrong, "--dry-run")
        assert code == 2 and f"did you mean {meant}?" in err and err.count("\n") == 1, err


def paper_checkpoint(folder: Path, config: dict[str, Any], seed: int) -> Path:
    """A checkpoint with the tensor names and shapes of HypeNet or Jet-Nemotron, written by hand."""
    hyper, generator = config["model_type"] == "hypenet", torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, 64), "model.norm.weight": (64,)}
    for i in range(4):
        prefix = f"model.layers.{i}.self_attn"
        shapes |= {f"{prefix}.{x}_proj.weight": (64 if x in "qo" or i in (0, 2) else 32, 64) for x in "qkvo"}
        if hyper:
            shapes |= {f"{prefix}.{x}_norm.weight": (16,) for x in "qk"}
        else:
            shapes |= {f"{prefix}.{x}_proj.bias": (64 if x == "q" or i in (0, 2) else 32,) for x in "qkv"}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text("raise SystemExit('never import this')\n")
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("config", [HYPENET, JET_NEMOTRON], ids=["hypenet", "jet_nemotron"])
def test_the_walk_through_of_the_papers_models(config: dict[str, Any], tmp_path: Path, run: Run) -> None:
    base, tuned = (paper_checkpoint(tmp_path / name, config, seed) for seed, name in enumerate(("base", "tuned")))
    places = {"BASE": base, "TUNED": tuned, "RESTORED": tmp_path / "restored"}
    text = (recipes_folder() / "hypenet" / "README.md").read_text()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    assert [shlex.split(c)[1] for c in commands] == ["inspect", "drift", "restore", "verify"]
    for command in commands:
        words = [str(places.get(word, word)) for word in shlex.split(command)]
        code, _, err = run(*words[1:])
        assert code == 0, (command, err)
    wanted, got = load_file(tuned / "model.safetensors"), load_file(places["RESTORED"] / "model.safetensors")
    before = load_file(base / "model.safetensors")
    changed = {name for name in wanted if not torch.equal(wanted[name], got[name])}
    parts = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
    assert changed == {n for n in wanted if n.split(".")[2] in ("1", "3") and n.endswith(parts)}
    assert all(torch.equal(got[name], before[name]) for name in changed)
    assert (places["RESTORED"] / "modeling_own.py").is_file()


def test_the_pages_commands(
    run: Run, tmp_path: Path, stand_ins: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execvpe", lambda file, command, environment: started.append(command))
    monkeypatch.setattr("qkguard.sft.train.train", lambda settings: None)
    page = (recipes_folder() / "README.md").read_text()
    commands = [shlex.split(line, comments=True) for line in page.split("```bash\n")[1].split("```")[0].splitlines()]
    assert len(commands) == 4
    for words in commands:
        if words[1] == "sft":
            words += replaced(find_recipe("qwen3/cot-sft/full"), stand_ins)
            words += ["--num-processes", "2"] if "--accelerate" in words else []
        code, _, err = run(*words[1:])
        assert code == 0, (words, err)
    assert (tmp_path / "mine.yaml").is_file() and "mine.yaml" in started[0]

    mixture = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "mixed.yaml").write_text(textwrap.dedent(mixture) + "model_name_or_path: m\noutput_dir: o\n")
    sources = parse([], tmp_path / "mixed.yaml").data.sources()
    assert [(s.path, s.config, s.weight, s.problem_column) for s in sources] == [
        ("open-r1/Mixture-of-Thoughts", "all", 3, "problem"),
        ("my/problems.jsonl", None, 1, "question"),
    ]
    by_hand = next(line for line in page.splitlines() if "`accelerate launch --config_file" in line)
    file = re.search(r"--config_file recipes/(\S+)", by_hand)
    assert file and (recipes_folder() / file[1]).is_file() and "-m qkguard.sft --config mine.yaml" in by_hand
