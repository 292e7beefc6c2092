"""The pages of the documentation and the README, and their code blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
RECIPES = ("README.md", "amnesia-lab/README.md", "demo/README.md", "hypenet/README.md")
WITH_CODE = ("README.md", "CONTRIBUTING.md", "examples/README.md", *(f"recipes/{page}" for page in RECIPES))
FENCE = re.compile(r"(?:^(?P<note> *<!--[^\n]*-->)\n+)?^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S)
ONLY_PARSED = re.compile(r"<!-- only parsed: (\S.*?) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block; `only_parsed` is the reason why a test does not run it, "" where it does."""

    page: str
    line: int
    language: str
    text: str
    only_parsed: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Every page with code, by its place in the repository."""
    own = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return [*(page for page in WITH_CODE if (ROOT / page).exists()), *own]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """The fenced blocks of a page. The comment `<!-- only parsed: reason -->` before one, which readers do not see,
    keeps a test from running it."""
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        note = ONLY_PARSED.fullmatch((match["note"] or "").strip())
        yield Block(page, line, match["language"], dedent(match["text"]), note[1] if note else "")


def blocks(*languages: str) -> list[Block]:
    """All blocks in these languages; all at all without one."""
    found = [block for page in pages() for block in blocks_of(page, read(page))]
    return [block for block in found if not languages or block.language in languages]


def commands_in(text: str) -> list[str]:
    """The commands of a bash block: continued lines joined, comments gone."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [" ".join(re.sub(r"(^|\s)#\s.*", "", line).split()) for line in lines]
    return [command for command in found if command]
