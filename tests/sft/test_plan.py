"""The plan's arithmetic against numbers worked out by hand, and the command lines that start ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import qkguard.demo
from qkguard.errors import QKGuardError
from qkguard.sft import launch
from qkguard.sft.arguments import Settings, parse
from qkguard.sft.launch import Launch, bundled_configs, launch_command, ranks_per_node
from qkguard.sft.plan import describe, max_steps, memory, plan
from qkguard.sft.preflight import preflight
from qkguard.sft.recipes import find_recipe, recipe_names, recipes_folder

DEMO = Path(qkguard.demo.__file__).parent / "model"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text((json.dumps({"prompt": "1 + 2 = ", "completion": "3 . so 3"}) + "\n") * 103)
    return file


def settings(rows: Path, *arguments: str) -> Settings:
    return parse(["--model_name_or_path", str(DEMO), "--dataset_name", str(rows), "--output_dir", "run", *arguments])


BILLION = 1_000_000_000


@pytest.mark.parametrize(
    ("arguments", "accelerate", "trained", "gigabytes"),
    [  # one billion parameters on 4 processes: weights + gradients + master copy and moments
        (["--dtype", "bfloat16"], "zero1", 1, 2 + 2 + 12 / 4),
        (["--dtype", "bfloat16"], "zero2", 1, 2 + (2 + 12) / 4),
        (["--dtype", "bfloat16"], "zero3", 1, (2 + 2 + 12) / 4),
        (["--dtype", "float32", "--bf16", "false"], "zero3", 1, (4 + 4 + 8) / 4),
        (["--dtype", "bfloat16"], "fsdp2", 1, (4 + 4 + 8) / 4),
        (["--dtype", "float32"], "ddp", 1, 4 + 4 + 8),
        (["--dtype", "bfloat16"], "single", 1, 2 + 2 + 4),  # no master copy
        (["--dtype", "bfloat16", "--use_peft"], "ddp", 0.01, 2 + 0.01 * 16),
        (["--dtype", "bfloat16", "--use_peft"], "zero3", 0.01, (2 + 0.01 * 16) / 4),
    ],
)
def test_memory(rows: Path, arguments: list[str], accelerate: str, trained: float, gigabytes: float) -> None:
    made = settings(rows, *arguments)
    found = memory(made, None, BILLION, int(trained * BILLION), accelerate, 4)
    assert found is not None and found["per_process"] == pytest.approx(gigabytes * BILLION, rel=1e-6)
    assert found["per_process"] == pytest.approx(sum(found[k] for k in ("weights", "gradients", "optimizer")), abs=3)


def test_steps_and_probe_costs(rows: Path) -> None:
    made = settings(
        rows,
        *("--num_train_epochs", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3"),
        *("--max_length", "1024", "--qkguard.probe_lengths", "512", "1024", "--qkguard.probe_depths", "3"),
        *("--qkguard.probe_samples", "2", "--qkguard.probe_tasks", "S1", "S2", "--qkguard.probe_steps", "4"),
    )
    found = preflight(made)
    assert max_steps(made, found, 4) == 9  # 103 rows -> 26 a process -> 13 batches -> 13 / 3 * 2 epochs
    made_plan = plan(made, found, accelerate=None, processes=4)
    probes = made_plan["probes"]
    assert probes["samples"] == 2 * 2 * 3 * 2 and probes["tokens"] == (512 + 1024) * 2 * 3 * 2
    assert probes["every"] == 4 and probes["count"] == 2 and probes["within_budget"] == 0
    trained = 9 * (2 * 3 * 4) * found.lengths[0]
    assert probes["share_of_training"] == pytest.approx(probes["tokens"] / 4 / trained)  # checkpointing: a fourth
    assert made_plan["data"]["batch"] == 24
    text = dict(line.split(maxsplit=1) for line in describe(made_plan).splitlines())
    assert probes["asked"] == 24 and "to fit" not in text["probes"], "fewer than thirty samples are not cut"
    assert "leaves room for about 0 of them" in text["probes"] and "9 steps of 24 sequences" in text["training"]


def test_the_samples_that_fit_the_budget_are_foretold(rows: Path) -> None:
    made = settings(rows, "--max_length", "512", "--qkguard.probe_lengths", "512", "1024")
    probes = plan(made, preflight(made), accelerate=None, processes=1)["probes"]
    assert probes["samples"] == 60 and probes["asked"] == 30
    made = settings(rows, "--max_length", "512", "--qkguard.probe_lengths", "512", "--qkguard.probe_budget", "1.0")
    assert plan(made, preflight(made), accelerate=None, processes=1)["probes"]["asked"] == 30


def test_guard_options_narrow_what_is_kept(rows: Path) -> None:
    def elements(*arguments: str) -> dict[str, Any]:
        made = settings(rows, *arguments)
        return plan(made, preflight(made), accelerate=None, processes=1)["guard"]

    both, queries = elements(), elements("--qkguard.projections", "q", "--qkguard.layers", "5", "--dtype", "bfloat16")
    assert both["elements"] == 2 * (192 * 192 + 192 * 96) and both["reference_bytes"] == 4 * both["elements"]
    assert queries["layers"] == [5] and queries["elements"] == 192 * 192
    assert queries["reference_bytes"] == 2 * queries["elements"]


def test_bundled_configs_are_what_they_are_called() -> None:
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "single": "NO", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED"}
    found = bundled_configs()
    assert set(found) == {*kinds, "zero3"}
    for name, file in found.items():
        values = yaml.safe_load(file.read_text())
        assert values["distributed_type"] == kinds.get(name, "DEEPSPEED")
        if name.startswith("zero"):
            assert values["deepspeed_config"]["zero_stage"] == int(name[-1])
        assert f"--config_file recipes/accelerate_configs/{name}.yaml" in file.read_text()
    assert yaml.safe_load(found["zero3"].read_text())["deepspeed_config"]["zero3_save_16bit_model"] is True


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "devices", lambda: 8)
    command, _ = launch_command(Launch("zero3"), ["--config", "r.yaml"])
    assert option(command, "--num_processes") == "8" and option(command, "--main_process_port") == "0"
    assert command[-5:] == ["-m", "qkguard", "sft", "--config", "r.yaml"]
    assert option(command, "--mixed_precision") == "bf16"

    nodes = Launch("fsdp2", nodes=4, node_rank=2, main_ip="10.0.0.1")
    command, _ = launch_command(nodes, [])
    assert option(command, "--num_processes") == "32" and option(command, "--num_machines") == "4"
    assert option(command, "--machine_rank") == "2" and option(command, "--main_process_ip") == "10.0.0.1"
    assert option(command, "--main_process_port") == "29500"

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    command, environment = launch_command(Launch("single"), [])
    assert option(command, "--num_processes") == "1" and environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert launch_command(Launch("ddp"), [])[1]["CUDA_VISIBLE_DEVICES"] == "5,6"

    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QKGuardError, match=r"needs DeepSpeed: pip install 'qkguard\[deepspeed\]'"):
        launch_command(Launch("zero2"), [])
    launch_command(Launch("ddp"), [])


def test_one_process_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "devices", lambda: 1)
    for name in ("zero3", "fsdp2", "ddp"):
        with pytest.raises(
            QKGuardError, match=r"there is only one \(one accelerator was found\); use --accelerate single"
        ):
            ranks_per_node(Launch(name))
        assert ranks_per_node(Launch(name, processes=2)) == 2
        assert ranks_per_node(Launch(name, nodes=2)) == 1
    assert ranks_per_node(Launch("zero2")) == 1  # it costs nothing there
    monkeypatch.setattr(launch, "devices", lambda: 0)
    with pytest.raises(QKGuardError, match=r"none was found; say how many CPU processes with --num-processes"):
        ranks_per_node(Launch("zero2"))


def test_several_accelerators_need_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "devices", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(QKGuardError, match="2 accelerators are visible and no launcher was asked for"):
        launch.refuse_data_parallel(use_cpu=False)
    launch.refuse_data_parallel(use_cpu=True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    launch.refuse_data_parallel(use_cpu=False)


def test_zero3_alone_must_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.deepspeed as ds

    zero: dict[str, Any] = {"stage": 3}
    monkeypatch.setattr(ds, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(ds, "deepspeed_config", lambda: {"zero_optimization": zero})
    with pytest.raises(QKGuardError, match="ZeRO-3 spreads a model over several processes, but there is only one"):
        launch.check_zero3(world_size=1)
    launch.check_zero3(world_size=2)
    zero["offload_param"] = {"device": "cpu"}
    launch.check_zero3(world_size=1)


def test_recipes_are_found_in_a_wheel_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qkguard.sft import recipes

    installed = tmp_path / "site-packages" / "qkguard"
    (installed / "recipes" / "accelerate_configs").mkdir(parents=True)
    (installed / "recipes" / "mine" / "cot-sft").mkdir(parents=True)
    (installed / "recipes" / "mine" / "cot-sft" / "full.yaml").write_text("# Mine\n")
    assert recipes_folder().name == "recipes" and "mine/cot-sft/full" not in recipe_names()
    monkeypatch.setattr(recipes, "PACKAGE", installed)
    assert list(recipe_names()) == ["mine/cot-sft/full"]
    assert find_recipe("recipes/mine/cot-sft/full.yaml").read_text() == "# Mine\n"
    monkeypatch.setattr(recipes, "PACKAGE", tmp_path)
    with pytest.raises(QKGuardError, match="install qkguard again"):
        recipes_folder()


def test_a_cpu_is_chosen_where_there_is_nothing_else(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(rows).training.use_cpu is not torch.accelerator.is_available()
    assert settings(rows, "--use_cpu", "true").training.use_cpu
