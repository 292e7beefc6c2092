"""Settings check themselves: every wrong value is one sentence, and old names work with one warning line each."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

import qkguard
from qkguard import QKGuardCallback, QKGuardConfig, QKGuardError
from qkguard.cli.options import current_flags
from qkguard.restore.registry import METHODS
from qkguard.sft.arguments import Settings, parse
from qkguard.training.schedules import is_due, pace
from tests.support.training import save_base

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"strict": "false"}, "Invalid strict='false': expected True or False."),
    ({"probe_restored": "no"}, "Invalid probe_restored='no': expected True or False."),
    ({"probe_restored": 1}, "Invalid probe_restored=1: expected True or False."),
    ({"probe_samples": 1.5}, "Invalid probe_samples=1.5: expected a whole number >= 1."),
    ({"probe_samples": True}, "Invalid probe_samples=True: expected a whole number >= 1."),
    ({"output_dir": 3}, "Invalid output_dir=3: expected a path, or None."),
    ({"haystack": "/nonexistent"}, "Invalid haystack='/nonexistent': no such file."),
    ({"haystack": Path("/nonexistent")}, "Invalid haystack='/nonexistent': no such file."),
    ({"spec": "/nonexistent.yaml"}, "Invalid spec='/nonexistent.yaml': no such file."),
    ({"base_model": 3}, "Invalid base_model=3: expected text, or None."),
    ({"probe_budget": 2}, "Invalid probe_budget=2: expected a number > 0 and <= 1, or None."),
    ({"recall_alert": float("nan")}, "Invalid recall_alert=nan: expected a number > 0 and <= 1."),
    (
        {"probe_lengths": "128"},
        "Invalid probe_lengths='128': expected a non-empty list of whole numbers >= 1, or None.",
    ),
    (
        {"probe_lengths": [128, 0]},
        "Invalid probe_lengths=[128, 0]: expected a non-empty list of whole numbers >= 1, or None.",
    ),
    ({"drift_steps": -1}, 'Invalid drift_steps=-1: expected a whole number >= 0 or "logging".'),
    (
        {"routing_drift_steps": "1.5"},
        "Invalid routing_drift_steps='1.5': expected a whole number >= 0 or \"logging\".",
    ),
    (
        {"probe_steps": "1.5"},
        "Invalid probe_steps='1.5': expected a whole number >= 0, a number > 0 and < 1 or \"eval\".",
    ),
    ({"layers": [-1]}, 'Invalid layers=[-1]: expected a list of whole numbers >= 0 or "retrieval", or None.'),
    ({"projections": ["v"]}, 'Invalid projections=[\'v\']: expected a non-empty list of "q" or "k".'),
    (
        {"method": "magic"},
        'Invalid method=\'magic\': expected "restore", "qk-pro", "procrustes", "interpolate" or "auto".',
    ),
    ({"shared": None}, 'Invalid shared=None: expected "keep", "restore" or "refuse".'),
    ({"method": "interpolate", "alpha": 2}, "Invalid alpha=2: expected a number >= 0 and <= 1."),
    ({"method": "qk-pro", "ridge": float("inf")}, "Invalid ridge=inf: expected a number >= 0."),
    ({"per_layer": 3}, "Invalid per_layer=3: expected a mapping of layers to numbers, such as {3: 0.5}, or None."),
    ({"drift_step": 3}, "Unknown setting drift_step=3. Did you mean drift_steps?"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_a_wrong_value_is_one_sentence(wrong: dict[str, Any], said: str) -> None:
    for make in (QKGuardConfig, QKGuardCallback, lambda **given: QKGuardCallback(QKGuardConfig(), **given)):
        with pytest.raises(QKGuardError) as found:
            make(**wrong)
        assert str(found.value) == said
        assert found.value.__cause__ is None and found.value.__suppress_context__, "pydantic's traceback shows"


def test_what_is_no_setting_at_all_is_one_sentence() -> None:
    with pytest.raises(
        QKGuardError, match=r"^Unknown setting zzz=3\. Known settings: base_model, method, .*strict\.$"
    ):
        QKGuardConfig(zzz=3)
    with pytest.raises(QKGuardError, match=r"^QKGuardConfig takes keyword arguments only; found 'restore'\.$"):
        QKGuardConfig("restore")
    with pytest.raises(QKGuardError, match=r"^Invalid config=\{'strict': True\}: expected a QKGuardConfig\. .*\.$"):
        QKGuardCallback({"strict": True})


def test_right_values_are_taken_in_every_form(tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    text.write_text("A river. ")
    config = QKGuardConfig(
        drift_steps="0",
        routing_drift_steps="logging",
        probe_steps="0.1",
        layers=(3, 7),
        probe_lengths=range(128, 257, 128),
        haystack=str(text),
        output_dir="mine",
        base_model=tmp_path,
        ridge=10,
    )
    assert (config.drift_steps, config.routing_drift_steps, config.probe_steps) == (0, "logging", 0.1)
    assert config.layers == [3, 7] and config.probe_lengths == [128, 256]
    assert config.haystack == text and config.output_dir == Path("mine") and config.base_model == str(tmp_path)
    assert QKGuardConfig(haystack=text, output_dir=Path("mine")).haystack == text
    assert QKGuardConfig(probe_steps="100").probe_steps == QKGuardConfig(probe_steps=100).probe_steps == 100
    assert config.to_json() == dataclasses.asdict(config) | {"haystack": str(text), "output_dir": "mine"}


def test_settings_do_not_change_in_mid_run_unchecked() -> None:
    config = QKGuardConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.strict = "no"  # type: ignore[misc, assignment]
    assert dataclasses.replace(config, strict=True).strict and not config.strict
    with pytest.raises(QKGuardError, match=r"^Invalid strict='no': "):
        dataclasses.replace(config, strict="no")


def test_the_methods_are_those_registered() -> None:
    assert set(typing.get_args(typing.get_type_hints(QKGuardConfig)["method"])) == {*METHODS, "auto"}


def test_schedules() -> None:
    assert [pace(steps) for steps in ("logging", 0, 1, 7)] == [
        "every logging step",
        "never",
        "every step",
        "every 7 steps",
    ]
    assert is_due("logging", 3, True) and not is_due("logging", 3, False)
    assert is_due(3, 6, False) and not is_due(3, 7, True) and not is_due(0, 6, True)


# -- old names ------------------------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"parts": ["q"]}, {"projections": ["q"]}),
        ({"entangled": "restore"}, {"shared": "restore"}),
        ({"method": "qk-pro", "strengths": {1: 2}}, {"method": "qk-pro", "per_layer": {1: 2}}),
        ({"gram": "input"}, {}),
        ({"allow_pickle": True}, {}),
    ],
)
def test_old_names_work_with_one_line(old: dict, new: dict, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    wanted = QKGuardConfig(**new)

    def from_recipe(**section: Any) -> QKGuardConfig:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({"qkguard": section}))
        return settings([], file).guard

    def from_command_line(**section: Any) -> QKGuardConfig:
        words = [
            [f"--qkguard.{key}", *map(str, value if isinstance(value, list) else [value])]
            for key, value in section.items()
        ]
        return settings([word for option in words for word in option]).guard

    for make in (
        QKGuardConfig,
        lambda **given: QKGuardCallback(**given).config,
        lambda **given: QKGuardCallback(QKGuardConfig(), **given).config,
        from_recipe,
        from_command_line,
    ):
        caplog.clear()
        assert make(**old) == wanted
        assert len(lines(caplog)) == 1 and next(iter(old.keys() - {"method"})) in lines(caplog)[0]
        caplog.clear()
        assert make(**new) == wanted and not lines(caplog)


def settings(arguments: list[str], recipe: Path | None = None) -> Settings:
    keys = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    return parse([*(f"--{key}={value}" for key, value in keys.items()), *arguments], recipe)


def test_an_old_name_in_a_recipe_gives_way_to_the_command_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("qkguard: {entangled: restore}")
    assert settings(["--qkguard.shared", "refuse"], file).guard.shared == "refuse" and len(lines(caplog)) == 1
    with pytest.raises(QKGuardError, match="parts and projections are the same setting"):
        QKGuardConfig(parts=["q"], projections=["q"])


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("restore --parts q", "restore --projections q"),
        ("restore --strengths=3=0.5", "restore --per-layer=3=0.5"),
        ("sweep --per-layer", "sweep --each-layer"),
        ("drift --entangled keep", "drift --shared keep"),
        ("restore --gram head --out o", "restore --out o"),
        ("restore --gram=head", "restore"),
        ("drift --allow-pickle --json", "drift --json"),
    ],
)
def test_old_flags_work_with_one_line(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert current_flags(typed.split()) == meant.split()
    assert capsys.readouterr().err.count("\n") == 1
    assert current_flags(meant.split()) == meant.split() and not capsys.readouterr().err


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = save_base(tmp_path_factory.mktemp("base"))
    return base, shutil.copytree(base, tmp_path_factory.mktemp("tuned"), dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"parts": ["q"]}, {"projections": ["q"]}),
        ({"entangled": "keep"}, {"shared": "keep"}),
        ({"method": "interpolate", "strengths": {1: 0.5}}, {"method": "interpolate", "per_layer": {1: 0.5}}),
        ({"method": "qk-pro", "gram": "head"}, {"method": "qk-pro"}),
        ({"allow_pickle": True}, {}),
    ],
)
def test_old_names_of_functions_work_with_one_line(
    old: dict, new: dict, pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    found = qkguard.restore_checkpoint(*pair, tmp_path / "old", **old)
    assert len(lines(caplog)) == 1
    wanted = qkguard.restore_checkpoint(*pair, tmp_path / "new", **new)
    same = found.keys() - {"created", "seconds", "written"}
    assert {key: found[key] for key in same if key in wanted} == {key: wanted[key] for key in same}
    assert len(lines(caplog)) == 1
    if "method" not in old:
        caplog.clear()
        assert qkguard.drift_report(*pair, **old)["layers"] == qkguard.drift_report(*pair, **new)["layers"]
        assert len(lines(caplog)) == 1
