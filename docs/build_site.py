"""Assembles the pages of the documentation site in build/docs and builds it strictly into build/site.

python docs/build_site.py          # `make docs`; --pages assembles and checks the pages alone

Pages are the Markdown files of docs/, README-like pages from elsewhere in the repository, and what is made from the
code: the command line's reference. A link that leads nowhere, a picture that is missing, a page that is not in the
navigation of zensical.toml, or a name there without a page, ends the build.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from docs.command_line import reference
from docs.example_scripts import scripts

ROOT = Path(__file__).parents[1]
DOCS, PAGES = ROOT / "docs", ROOT / "build" / "docs"
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "recipes/README.md": "recipes.md",
    "recipes/amnesia-lab/README.md": "amnesia-lab.md",
    "recipes/demo/README.md": "demo-model.md",
    "recipes/hypenet/README.md": "hypenet.md",
}
"""Pages that lie elsewhere in the repository -> their names on the site."""
MADE = {"cli.md": reference}
LONGER = {"examples.md": scripts}
"""What is made to stand at the end of a page."""
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


class BrokenPageError(Exception):
    """A page that readers could not follow."""


def sources() -> dict[str, str]:
    """A page's place in the repository -> its place on the site, for every page that is not made from the code."""
    found = {f"docs/{path.relative_to(DOCS).as_posix()}": path for path in DOCS.rglob("*.md")}
    places = {place: place.removeprefix("docs/") for place in sorted(found)}
    return places | ELSEWHERE


def assemble(pages: Path = PAGES) -> None:
    """Write every page and every file that one links to into a fresh folder.

    Raises:
        BrokenPageError: links that lead nowhere, pages and navigation that differ.
    """
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    places = sources()
    broken: list[str] = []
    for source, target in places.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        more = LONGER[target]() if target in LONGER else ""
        write(pages / target, linked(text, source, places, pages, broken) + more)
    for target, make in MADE.items():
        write(pages / target, make())
    for path in (DOCS / "static").iterdir():
        shutil.copy(path, pages / path.name)
    found, named = {*places.values(), *MADE}, set(navigation())
    broken += [f"{page}: not in the navigation of zensical.toml" for page in sorted(found - named)]
    broken += [f"zensical.toml: the navigation names {page}, which does not exist" for page in sorted(named - found)]
    if broken:
        raise BrokenPageError("\n".join(broken))


def linked(text: str, source: str, places: dict[str, str], pages: Path, broken: list[str]) -> str:
    """A page with its links as the site has them; files that are no pages are copied beside the pages."""
    here = places[source]

    def replace(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_sign, anchor = target.partition("#")
        place = os.path.normpath(os.path.join(os.path.dirname(source), path))
        there = places.get(place) or (place.removeprefix("docs/") if place.removeprefix("docs/") in MADE else None)
        if there is None and (ROOT / place).is_file() and not place.startswith(".."):
            there = place.removeprefix("docs/")
            write(pages / there, (ROOT / place).read_bytes())
        if there is None:
            broken.append(f"{source}: there is no {place} to link to")
            return match[0]
        return before + os.path.relpath(there, os.path.dirname(here) or ".") + hash_sign + anchor + after

    return "".join(part if is_code else LINK.sub(replace, part) for part, is_code in parts(text))


def parts(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is code."""
    end = 0
    for match in CODE.finditer(text):
        yield text[end : match.start()], False
        yield match[0], True
        end = match.end()
    yield text[end:], False


def navigation() -> Iterator[str]:
    """The pages that zensical.toml names."""
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    yield from _pages(config["project"]["nav"])


def _pages(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from _pages(inner)


def write(path: Path, content: str | bytes) -> None:
    """Write a file, its folder too where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def main() -> int:
    try:
        assemble()
    except BrokenPageError as error:
        print(error, file=sys.stderr)
        return 1
    if "--pages" in sys.argv[1:]:
        return 0
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    built = subprocess.run(command, cwd=ROOT, check=False, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(built.stderr)
    # Zensical's strict mode knows nothing of what mkdocstrings finds wrong in a docstring
    return built.returncode or int("griffe:" in built.stderr)


if __name__ == "__main__":
    sys.exit(main())
