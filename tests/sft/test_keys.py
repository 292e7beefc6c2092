"""Keys and values as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qkguard.errors import QKGuardError
from qkguard.layout.cache import recalled
from qkguard.sft import keys
from qkguard.sft.arguments import parse
from qkguard.sft.keys import check_settings, known_keys, plain_lists

NEEDED = ["--model_name_or_path", "m", "--output_dir", "run", "--dataset_name", "d"]


@pytest.mark.parametrize(
    "typed",
    [["[256,", "512]"], ["[256, 512]"], ["[256,512]"], ["256", "512"]],
)
def test_lists_in_every_form(typed: list[str]) -> None:
    modules = [word.replace("256", "q_proj").replace("512", "v_proj") for word in typed]
    made = parse([*NEEDED, "--qkguard.probe_lengths", *typed, "--lora_target_modules", *modules, "--seed", "7"])
    assert made.guard.probe_lengths == [256, 512] and made.training.seed == 7
    assert made.model.lora_target_modules == ["q_proj", "v_proj"]
    equals = parse([*NEEDED, f"--qkguard.probe_lengths={typed[0]}", *typed[1:]])
    assert equals.guard.probe_lengths == [256, 512]


def test_brackets_stay_where_no_list_is_meant() -> None:
    assert plain_lists(["--run_name", "[a,", "b]", "--x=[1]"], {"y"}) == ["--run_name", "[a,", "b]", "--x=[1]"]
    assert plain_lists(["--y=[1,", "b]", "--y", "[half"], {"y"}) == ["--y", "1", "b", "--y", "[half"]
    with pytest.raises(QKGuardError, match="probe_lengths"):
        parse([*NEEDED, "--qkguard.probe_lengths", "[256,", "many]"])


def test_the_table_of_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made by the first training, for these versions; without it only TRL itself can refuse."""
    monkeypatch.setenv("QKGUARD_CACHE", str(tmp_path / "cache"))
    wrong = [*NEEDED, "--learning_rte", "1e-5"]
    check_settings(wrong, None)
    assert known_keys() is None
    with pytest.raises(QKGuardError, match="learning_rte: did you mean --learning_rate"):
        parse(wrong)
    known = known_keys()
    assert known is not None and {"learning_rate", "dataset_name", "max_length"} <= set(known.keys)
    assert {"--learning_rate", "--learning-rate", "--no_gradient_checkpointing"} <= set(known.options)
    check_settings([*NEEDED, "--learning-rate", "1e-5", "--no_gradient_checkpointing", "--layers=[1]"][:-1], None)
    with pytest.raises(QKGuardError, match="learning_rte: did you mean --learning_rate"):
        check_settings(wrong, None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_lenght: 3\n")
    with pytest.raises(QKGuardError, match=r"recipe.yaml: .*max_lenght: did you mean max_length"):
        check_settings(NEEDED, recipe)
    with pytest.raises(QKGuardError, match="output_dir is missing"):
        check_settings(NEEDED[:2], None)
    monkeypatch.setattr(keys, "_versions", lambda: {"trl": "another"})
    assert known_keys() is None and recalled("keys", {"trl": "another"}) is None
