"""The pages are whole: links, navigation, names, settings, messages and options are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import typer

import qkguard
from docs import build_site, what_works
from docs.command_line import commands, reference
from qkguard.cli import app
from tests.support.pages import ROOT, blocks, commands_in, pages, read

SETTINGS = set(qkguard.QKGuardConfig.__dataclass_fields__)


def test_links_and_navigation_are_whole(tmp_path: Path) -> None:
    build_site.assemble(tmp_path)
    assert (tmp_path / "index.md").is_file() and (tmp_path / "demo.png").is_file()
    assert "(recipes.md#packing)" in (tmp_path / "faq.md").read_text()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("[a](nowhere.md)", "there is no docs/nowhere.md"), ("![a](no.png)", "there is no docs/no.png")],
)
def test_a_broken_link_is_found(text: str, wanted: str, tmp_path: Path) -> None:
    broken: list[str] = []
    build_site.linked(f"`[b](in-code.md)` {text}", "docs/faq.md", build_site.sources(), tmp_path, broken)
    assert len(broken) == 1 and wanted in broken[0]


def test_a_page_outside_the_navigation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = [page for page in build_site.navigation() if page != "faq.md"]
    monkeypatch.setattr(build_site, "navigation", lambda: [*named, "ghost.md"])
    with pytest.raises(build_site.BrokenPageError) as error:
        build_site.assemble(tmp_path)
    assert "faq.md: not in the navigation" in str(error.value) and "names ghost.md" in str(error.value)


def test_the_readme_is_short_and_its_script_is_the_quickstart_s() -> None:
    assert len(read("README.md").splitlines()) <= 150
    scripts = [
        {block.text for block in blocks("python") if block.page == page and block.text.startswith("# sft.py")}
        for page in ("README.md", "docs/quickstart.md")
    ]
    assert scripts[0] == scripts[1] and len(scripts[0]) == 1


@pytest.mark.parametrize("page", pages())
def test_names_and_keys_exist(page: str) -> None:
    text = read(page)
    for name in re.findall(r"`qkguard\.(?!json)(\w+)`", text):
        assert hasattr(qkguard, name), name
    for call in re.findall(r"QKGuard(?:Callback|Config)\(([^()]*)\)", text):
        for key in re.findall(r"(\w+)=", call):
            assert key in SETTINGS, key
    for key in re.findall(r"^`?([a-z]\w*)=", text, re.M):
        assert key in SETTINGS, key


def test_what_works_is_the_scripts() -> None:
    text = what_works.PAGE.read_text(encoding="utf-8")
    assert what_works.written(text) == text and "| ZeRO-3 | 2, 3 |" in text, "python docs/what_works.py"


def test_the_pages_show_every_command() -> None:
    shown = {" ".join(command.split()[:2]) for block in blocks("bash") for command in commands_in(block.text)}
    every = {name for name, _ in commands(typer.main.get_command(app), "qkguard")}
    assert {" ".join(name.split()[:2]) for name in every} <= shown


def test_the_reference_has_every_option_with_its_help() -> None:
    text = reference()
    for name, command in commands(typer.main.get_command(app), "qkguard"):
        part = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for param in command.params:
            if param.name != "help" and not getattr(param, "hidden", False):
                assert param.help, (name, param.name)
                assert param.param_type_name == "argument" or f"`{param.opts[0]}`" in part, (name, param.name)


# -- messages ---------------------------------------------------------------------------------------------------------


@cache
def literals() -> list[str]:
    """Every text in the package, values in it as a NUL."""
    found = []
    for path in sorted((ROOT / "qkguard").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.\w]*[sdfg]", "\0", node.value))
    return found


def is_said(message: str, texts: Sequence[str]) -> bool:
    """Whether some text has the message's pieces, what lies between the dots, in their order."""
    pieces = [piece for piece in re.split(r"\.\.\.", message) if piece.strip(" :.,")]
    pattern = re.compile(".*".join(re.escape(piece.strip()) for piece in pieces), re.DOTALL)
    return any(pattern.search(text) for text in texts)


def messages() -> list[str]:
    return re.findall(r"^### `(.+)`$", read("docs/troubleshooting.md"), re.M)


@pytest.mark.parametrize("message", messages())
def test_every_message_is_still_in_the_code(message: str) -> None:
    assert len(message.replace(".", "").split()) >= 2
    assert is_said(message, literals())


def test_another_message_is_not() -> None:
    assert len(messages()) >= 25
    assert not is_said("The model was loaded from ..., which is fine.", literals())
    assert not is_said("is in its place ... There is no such folder", ["There is no such folder: \0 is in its place"])
