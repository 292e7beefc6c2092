"""The page of the example scripts, made from examples/ (`docs/build_site.py` writes it)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
INTRO = """\
# Examples

Complete scripts that run as they are: on a CPU with the small hybrid that ships with qkguard, and by an argument on a
model and rows of your own. Each is run by a test. They are in the folder `examples` of a clone.
"""


def page() -> str:
    """Markdown: every script under its own first sentence, with its commands and its text."""
    return INTRO + "".join(sections())


def sections() -> Iterator[str]:
    """One for each script, those of one name after the other."""
    for script in sorted(EXAMPLES.glob("*.py")):
        text = script.read_text(encoding="utf-8")
        title, _, rest = (ast.get_docstring(ast.parse(text)) or script.stem).partition("\n")
        code = text.split('"""', 2)[2].strip()
        commands = f"\n```text\n{rest.strip()}\n```\n" if rest.strip() else ""
        yield f"\n## {script.name}\n\n{title}\n{commands}\n```python\n{code}\n```\n"
    for notebook in sorted(EXAMPLES.glob("*.ipynb")):
        yield f"\n## {notebook.name}\n\nA notebook with its outputs: `examples/{notebook.name}`.\n"
