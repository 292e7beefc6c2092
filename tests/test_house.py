"""The house rules of CONTRIBUTING, read from the source: rooms and arrows, short trips, plain code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from docs.architecture import docstring, layers, written
from tests.conftest import LONGEST

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qkguard"
LEVEL = {room: number for number, layer in enumerate(layers()) for room in layer}
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
MOST_LINES = 420
MOST_FILES = 6

Graph = dict[str, set[str]]


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def imported_names(path: str, text: str) -> tuple[str, ...]:
    """What a file imports, wherever the statement stands: lazy and TYPE_CHECKING ones count."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


def imports(sources: Mapping[str, str]) -> Graph:
    """Module -> the modules it imports."""
    modules = {module_of(path) for path in sources}
    graph: Graph = {module: set() for module in modules}
    for path, text in sources.items():
        for name in imported_names(path, text):
            found = name if name in modules else name.rpartition(".")[0]
            if found in modules and found != module_of(path):
                graph[module_of(path)].add(found)
    return graph


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def violations(graph: Graph) -> list[str]:
    """Cycles between files or rooms, and arrows that do not point down."""
    found = []
    rooms: Graph = {}
    for module, targets in graph.items():
        for target in targets:
            here, there = room_of(module), room_of(target)
            if here not in LEVEL or there not in LEVEL or here == there:
                continue
            rooms.setdefault(here, set()).add(there)
            if LEVEL[there] <= LEVEL[here]:
                found.append(f"{module} imports {target}")
    for name, arrows in (("files", graph), ("rooms", rooms)):
        try:
            TopologicalSorter(arrows).prepare()
        except CycleError as error:
            found.append(f"a cycle between {name}: {' -> '.join(error.args[1])}")
    return found


def test_every_arrow_points_down() -> None:
    graph = imports(SOURCES)
    assert {room_of(module) for module in graph} - {"", "__main__"} == set(LEVEL), "a room without a layer"
    assert violations(graph) == []


LAZY = "def late():\n    from qkguard.{} import x\n"
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from qkguard.{} import X\n"


@pytest.mark.parametrize("statement", [LAZY, TYPES, "import qkguard.{}\n"])
@pytest.mark.parametrize(
    ("where", "what", "wanted"),
    [
        ("qkguard/layout/rows.py", "training.config", "qkguard.layout.rows imports qkguard.training.config"),
        ("qkguard/demo/show.py", "sft.plan", "qkguard.demo.show imports qkguard.sft.plan"),
        ("qkguard/errors.py", "errors_twin", "a cycle between files"),
    ],
)
def test_a_wrong_arrow_is_found(statement: str, where: str, what: str, wanted: str) -> None:
    sources = SOURCES | {where: SOURCES[where] + statement.format(what)}
    sources["qkguard/errors_twin.py"] = "import qkguard.errors\n"
    assert any(text.startswith(wanted) for text in violations(imports(sources)))


def trips() -> dict[str, list[tuple[str, str]]]:
    """Heading -> stops (file, function) of the numbered lists in CONTRIBUTING."""
    found: dict[str, list[tuple[str, str]]] = {}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for title, block in re.findall(r"^\*\*(.+?)\*\*.*\n\n((?:\d+\. .*\n(?:   .*\n)*)+)", text, re.M):
        stops = re.findall(r"`([\w/]+\.py):([\w.]+)`", block)
        if stops:
            found[title] = stops
    return found


def definitions(path: str) -> dict[str, ast.AST]:
    """Functions and classes of a file, methods as Class.method."""
    out: dict[str, ast.AST] = {}
    for node in ast.parse(SOURCES[f"qkguard/{path}"]).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            out[node.name] = node
        if isinstance(node, ast.ClassDef):
            out |= {f"{node.name}.{m.name}": m for m in node.body if isinstance(m, ast.FunctionDef)}
    return out


def names_used(text: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(text)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return used | {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


def broken_stops(stops: list[tuple[str, str]]) -> list[str]:
    """Stops that do not exist, or that nothing on the way so far refers to."""
    broken = []
    for number, (path, name) in enumerate(stops):
        if f"qkguard/{path}" not in SOURCES or name not in definitions(path):
            broken.append(f"{path}:{name} does not exist")
        elif number:
            earlier = {p for p, _ in stops[:number]}
            used = set().union(*(names_used(SOURCES[f"qkguard/{p}"]) for p in earlier if f"qkguard/{p}" in SOURCES))
            if name.split(".")[-1] not in used and name.split(".")[0] not in used:
                broken.append(f"nothing before {path}:{name} refers to it")
    return broken


def test_the_trips_are_short_and_true() -> None:
    found = trips()
    assert len(found) == 3, found
    for title, stops in found.items():
        assert 1 < len({path for path, _ in stops}) <= MOST_FILES, title
        assert broken_stops(stops) == [], title


def test_a_wrong_stop_is_found() -> None:
    first = next(iter(trips().values()))[0]
    assert broken_stops([first, ("errors.py", "nothing")]) == ["errors.py:nothing does not exist"]
    assert broken_stops([first, ("report/sentences.py", "describe")]) == [
        "nothing before report/sentences.py:describe refers to it"
    ]


def complaints(path: str, text: str) -> Iterator[str]:
    """House rules that a file breaks."""
    if len(text.splitlines()) > MOST_LINES:
        yield f"{path}: more than {MOST_LINES} lines"
    for node in ast.walk(ast.parse(text)):
        where = f"{path}:{getattr(node, 'lineno', 1)}"
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            if any(isinstance(inner, ast.NamedExpr) for inner in ast.walk(node)):
                yield f"{where}: a walrus inside a comprehension"
        elif isinstance(node, ast.Lambda):
            simple = isinstance(node.body, (ast.Name, ast.Attribute, ast.Constant))
            if not simple or node.end_lineno != node.lineno:
                yield f"{where}: a lambda longer than a name"
    for name, node in public_functions(text):
        if ast.get_docstring(node) is None:
            yield f"{path}:{node.lineno}: {name} has no docstring"


def public_functions(text: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node


@pytest.mark.parametrize("path", SOURCES)
def test_the_house_rules_hold(path: str) -> None:
    assert list(complaints(path, SOURCES[path])) == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[y for x in z if (y := x)]", "walrus"),
        ("f = lambda x: x + 1", "lambda"),
        ("f = lambda x: (\n x)", "lambda"),
        ("def f(): pass", "docstring"),
        ("x = 1\n" * 421, "lines"),
    ],
)
def test_a_broken_rule_is_found(text: str, wanted: str) -> None:
    (found,) = complaints("a.py", text)
    assert wanted in found


@pytest.mark.parametrize("room", [room for room in LEVEL if (PACKAGE / room).is_dir()])
def test_rooms_introduce_themselves(room: str) -> None:
    """What lives there, what it may import, and public functions that exist."""
    doc = docstring(room)
    allowed = re.search(r"May import `(\w+)`|May import every other room", doc)
    assert allowed, "what it may import"
    highest = LEVEL[allowed[1]] if allowed[1] else 1
    assert highest > LEVEL[room]
    used = {room_of(t) for m, targets in imports(SOURCES).items() if room_of(m) == room for t in targets} - {room, ""}
    assert min((LEVEL[other] for other in used), default=highest) >= highest, used
    public = re.search(r"Public:(.*?)(\n\n|\Z)", doc, re.S)
    assert public, "its public functions"
    named = re.findall(r"`([\w.]+)`", public[1])
    assert named
    for name in named:
        module, _, function = name.rpartition(".")
        if module or room == "cli":
            assert function in definitions(f"{room}/{module or '__init__'}.py"), name


def test_the_picture_is_the_scripts() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert written(text) == text, "python docs/architecture.py"


def test_the_longest_tests_are_files() -> None:
    """What is misspelt would begin last, and a run ends as late as its last file."""
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []
