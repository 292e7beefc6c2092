"""The floors of pyproject.toml are the versions that `make test-oldest` runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.version import Version

from tests.support.pages import read
from tests.versions.environments import CORE, SHOWN, floors, installed, main, pins

ROOT = Path(__file__).parents[2]


def differing(floors: dict[str, str], pins: dict[str, str]) -> list[str]:
    """Packages whose pin is not of the release that the floor names: a floor of 1.4 is any 1.4.x."""
    wrong = []
    for package, floor in floors.items():
        pin = pins.get(package, "")
        if pin != floor and not pin.startswith(f"{floor}."):
            wrong.append(f"{package}: {pin or 'nothing'} for >={floor}")
    return wrong


def test_every_floor_is_what_is_tested() -> None:
    assert differing(floors(), pins()) == []
    assert set(SHOWN) <= set(floors())


def test_a_floor_that_is_not_tested_is_found() -> None:
    assert differing({"a": "1.4", "b": "2.0"}, {"a": "1.40.0"}) == ["a: 1.40.0 for >=1.4", "b: nothing for >=2.0"]


def test_the_page_says_the_same_floors() -> None:
    table = dict(re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \|", read("docs/versions.md"), re.MULTILINE))
    assert table == {package: pins()[package] for package in SHOWN}


def test_this_environment_is_between_them() -> None:
    found = dict(pair.split(" ") for pair in installed().split(", "))
    for package in SHOWN:
        assert found[package] == package or Version(found[package]) >= Version(pins()[package])


def test_folders_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert all((ROOT / "tests" / place).exists() for place in CORE)
    assert main(["eldest"]) == 2 and "expected: oldest or newest" in capsys.readouterr().err
