"""docs/CONFIG.md is what the help texts say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from pydantic.dataclasses import dataclass

from docs import config_reference
from docs.config_reference import TARGET, document
from qkguard import QKGuardConfig
from qkguard.sft.arguments import parse
from qkguard.sft.data import DataArguments
from qkguard.training.checked import STRICT, helps


def test_the_page_is_current() -> None:
    assert TARGET.read_text(encoding="utf-8") == document(), "python docs/config_reference.py"


def test_it_would_notice_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True, config=STRICT)
    class Changed(QKGuardConfig):
        another: int = 3
        """One | more."""

    monkeypatch.setattr(config_reference, "QKGuardConfig", Changed)
    assert "| `another` | `int`; default `3`<br>One \\| more. |" in document() != TARGET.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", [QKGuardConfig, DataArguments])
def test_every_setting_has_a_help_text(kind: type) -> None:
    assert helps(kind).keys() == {field.name for field in dataclasses.fields(kind)} and all(helps(kind).values())


def test_every_setting_is_a_recipe_key_and_an_option(tmp_path: Path) -> None:
    values = dataclasses.asdict(QKGuardConfig())
    recipe = tmp_path / "recipe.yaml"
    keys = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    recipe.write_text(yaml.safe_dump(keys | {"qkguard": values}))
    assert parse([], recipe).guard == QKGuardConfig()
    changed = {"output_dir": "mine", "layers": [3, 7], "probe_budget": 0.5, "strict": True}
    changed |= {"method": "interpolate", "per_layer": {3: 0.5}}
    recipe.write_text(yaml.safe_dump(keys | {"qkguard": values | changed}))
    assert parse([], recipe).guard == QKGuardConfig(**changed) != QKGuardConfig()
    typed = ["--qkguard.output_dir", "mine", "--qkguard.layers", "3", "7", "--qkguard.per_layer", '{"3": 0.5}']
    typed += ["--qkguard.method", "interpolate"]
    typed += [f"--{key}={value}" for key, value in keys.items()] + ["--qkguard.probe_budget=0.5", "--qkguard.strict"]
    assert parse(typed).guard == QKGuardConfig(**changed)


def test_contributing_names_files_that_exist() -> None:
    root = TARGET.parents[1]
    words = re.findall(r"`([\w./-]+(?:/|\.py))`", (root / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    named = [word for word in words if "*" not in word]
    places = (root, root / "qkguard", root / "tests", root / "tests" / "distributed")
    missing = [word for word in named if not any((place / word).exists() for place in places)]
    assert len(named) > 15 and not missing
