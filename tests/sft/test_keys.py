"""Keys and values as they are typed."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

import pytest
from trl import ModelConfig, SFTConfig, TrlParser

from qkguard.errors import QKGuardError
from qkguard.sft import trl_keys
from qkguard.sft.arguments import parse
from qkguard.sft.data import DataArguments
from qkguard.sft.keys import check_settings, known_keys, plain_lists

NEEDED = ["--model_name_or_path", "m", "--output_dir", "run", "--dataset_name", "d"]
WRONG = [*NEEDED, "--learning_rte", "1e-5"]


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


def test_keys_read_from_source_are_the_parsers() -> None:
    """Neither a key that TRL would refuse, nor one missing that it takes; every option as it may be typed."""
    parser = TrlParser((DataArguments, SFTConfig, ModelConfig), allow_abbrev=False, add_help=False)
    wanted = set().union(*(get_type_hints(kind) for kind in (DataArguments, SFTConfig, ModelConfig)))
    assert known_keys() == wanted and len(wanted) > 100
    options = sorted(parser._option_string_actions)
    assert {"--learning_rate", "--learning-rate", "--no_gradient_checkpointing"} <= set(options)
    for option in options:
        check_settings([*NEEDED, option, "1"], None)
        with pytest.raises(QKGuardError, match=f"Unknown key {option}x"):
            check_settings([*NEEDED, f"{option}x", "1"], None)


def test_wrong_keys_are_refused_before_trl_is_imported(tmp_path: Path) -> None:
    with pytest.raises(QKGuardError, match="learning_rte: did you mean --learning_rate"):
        check_settings(WRONG, None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_lenght: 3\n")
    with pytest.raises(QKGuardError, match=r"recipe.yaml: .*max_lenght: did you mean max_length"):
        check_settings(NEEDED, recipe)
    with pytest.raises(QKGuardError, match="output_dir is missing"):
        check_settings(NEEDED[:2], None)


SOURCE = "class {}({}):\n    learning_rate: float = 1e-5\n    {}\n"


@pytest.mark.parametrize(
    ("base", "field", "found"),
    [
        ("SFTConfig", "seed: int = 1", {"learning_rate", "seed"}),
        ("SFTConfig", "seed: int = field(metadata={'aliases': ['--s']})", None),
        ("Elsewhere", "seed: int = 1", None),
        ("trl.Elsewhere", "seed: int = 1", None),
        ("SFTConfig", "seed: int 1", None),
    ],
)
def test_sources_of_another_form_leave_it_to_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, field: str, found: set[str] | None
) -> None:
    file = tmp_path / "config.py"
    file.write_text(SOURCE.format("ModelConfig", base, field) + SOURCE.format("SFTConfig", "", "pass"))
    monkeypatch.setattr(trl_keys, "_files", lambda: [file])
    trl_keys.trl_keys.cache_clear()
    try:
        assert trl_keys.trl_keys() == found
        if found is None:
            check_settings(WRONG, None)
        else:
            with pytest.raises(QKGuardError, match="Unknown key"):
                check_settings(WRONG, None)
    finally:
        trl_keys.trl_keys.cache_clear()
