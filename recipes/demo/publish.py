"""The demo's picture, table and numbers in the README and the docs, from a finished demo.

    ATEN_CPU_CAPABILITY=avx2 qkguard demo
    python recipes/demo/publish.py qkguard-demo

Rewrites what stands between `<!-- demo: ... -->` and `<!-- end -->`, and docs/demo.png.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from qkguard.demo import show
from qkguard.demo.scores import Score
from qkguard.report.run import load_run

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/quickstart.md", "docs/choosing.md")


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def sentence(scores: dict[str, Score]) -> str:
    """Recall and skill of the three models, and which restore the third is."""
    before, raw, restored = scores.values()
    recall = [f"{score.mean_recall:.2f}" for score in scores.values()]
    return (
        f"recall {recall[0]} before SFT, {recall[1]} after it, {recall[2]} restored ({restored.point}); chains of "
        f"thought right {before.cot_accuracy:.2f}, {raw.cot_accuracy:.2f}, {restored.cot_accuracy:.2f}"
    )


def points(verdict: dict[str, Any]) -> str:
    """Every point of the verdict: recall with its interval, and the loss of the task."""
    rows = []
    for point in verdict["points"]:
        found, task = point["recall"], point["task"]
        recall = f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
        name = "before SFT" if point["kind"] == "base" else point["name"]
        name = f"**{name}**" if point["name"] == verdict["recommended"] else name
        rows.append([name, recall, "" if task is None else f"{task['loss']:.3f}"])
    return markdown(["", "recall", "task loss"], rows)


def scores_of(folder: Path) -> dict[str, Score]:
    """The demo's scores, read back."""
    scores = {}
    for name, score in json.loads((folder / "demo.json").read_text())["scores"].items():
        recall = {int(length): share for length, share in score["recall"].items()}
        scores[name] = Score(score["point"], recall, score["cot_accuracy"])
    return scores


def texts(folder: Path) -> dict[str, str]:
    """What goes between the markers, by their names."""
    report, scores = json.loads((folder / "demo.json").read_text()), scores_of(folder)
    verdict = load_run(folder).verdict
    assert verdict is not None
    words = "\n" + "\n".join(f"> {words}" for words in report["words"]) + "\n"
    return {
        "sentence": sentence(scores),
        "table": markdown(*show.table(scores)),
        "points": points(dict(verdict)),
        "words": words,
    }


def written(text: str, found: dict[str, str]) -> str:
    """A page with what is between its markers replaced."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- demo: {match[1]} -->{found[match[1]]}<!-- end -->"

    return re.sub(r"<!-- demo: (\w+) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main() -> None:
    folder = Path(sys.argv[1])
    found = texts(folder)
    for name in PAGES:
        page = ROOT / name
        page.write_text(written(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    show.picture(ROOT / "docs" / "demo.png", load_run(folder), scores_of(folder))


if __name__ == "__main__":
    main()
