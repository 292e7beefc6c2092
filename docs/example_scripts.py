"""The example scripts and the notebook as text for their page, made from examples/ by `docs/build_site.py`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
TOOLS = {"execute_notebook.py"}  # scripts that are no examples


def scripts() -> str:
    """Markdown: every script and the notebook, with its commands and its code."""
    return "".join(sections())


def sections() -> Iterator[str]:
    """One for each, scripts first."""
    for script in sorted(path for path in EXAMPLES.glob("*.py") if path.name not in TOOLS and not is_source(path)):
        text = script.read_text(encoding="utf-8")
        title, _, rest = (ast.get_docstring(ast.parse(text)) or script.stem).partition("\n")
        code = text.split('"""', 2)[2].strip()
        commands = f"\n```text\n{rest.strip()}\n```\n" if rest.strip() else ""
        yield f"\n## {script.name}\n\n{title}\n{commands}\n```python\n{code}\n```\n"
    for notebook in sorted(EXAMPLES.glob("*.ipynb")):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        yield f"\n## {notebook.name}\n\n" + "\n\n".join(shown(cell) for cell in cells) + "\n"


def is_source(script: Path) -> bool:
    """Whether a notebook is made of this script, and shows it."""
    return script.with_suffix(".ipynb").exists()


def shown(cell: Mapping[str, Any]) -> str:
    """A cell of a notebook: its text, its headings two levels further down; or its code and what that printed."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return re.sub(r"^#", "###", source, flags=re.MULTILINE)
    return "\n\n".join([f"```python\n{source}\n```", *filter(None, map(output, cell["outputs"]))])


def output(found: Mapping[str, Any]) -> str:
    """An output: text, or a picture in the page itself; "" for others."""
    data = found.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = "".join(found.get("text") or data.get("text/plain") or "").strip()
    return f"```text\n{text}\n```" if text else ""
