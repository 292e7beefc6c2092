"""Writes the table in docs/sharding.md of what works on real ranks, from the list of cases that the tests run.

python docs/what_works.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.distributed.test_ranks import CASES

PAGE = Path(__file__).with_name("sharding.md")
START, END = "<!-- what works: python docs/what_works.py -->", "<!-- end -->"
BACKENDS = {
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "offload": "ZeRO with CPU offload",
    "nogather": "ZeRO-3 without gather-on-save",
    "fsdp2": "FSDP2",
    "loaded_fsdp2": "FSDP2, sharded while loading",
}
# Column -> kinds of cases, or flags of theirs; what the cases do is in tests/distributed/*cases.py.
COLUMNS = {
    "full fine-tuning": ("guarded", "launcher"),
    "LoRA, DoRA": ("lora", "dora", "lora_neutral", "lora_fsdp2"),
    "probes, live swap": ("swapped", "trained_alike"),
    "verdict": ("verdict",),
    "bit-identical with and without": ("neutral", "lora_neutral", "trained_alike", "verdict"),
    "resume": ("resumed", "continued_elsewhere"),
    "`qkguard sft`": ("launcher",),
}


def table() -> str:
    """Markdown: a row per way of training, in a cell the numbers of ranks of the cases that ran."""
    cells: dict[tuple[str, str], set[int]] = {}
    for ranks, names in CASES.items():
        for name in names:
            kind, _, options = name.partition("@")
            flags = set(options.split(",")) | ({"fsdp2"} if "fsdp2" in kind else set())
            for backend in set(BACKENDS) & flags:
                for column in (c for c, known in COLUMNS.items() if {kind, *flags} & set(known)):
                    cells.setdefault((backend, column), set()).add(ranks)
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for backend, label in BACKENDS.items():
        found = [sorted(cells.get((backend, column), ())) for column in COLUMNS]
        lines.append(f"| {label} | {' | '.join(', '.join(map(str, ranks)) for ranks in found)} |")
    return "\n".join(lines)


def written(text: str) -> str:
    """The page with a fresh table."""
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{START}\n\n{table()}\n\n{END}", text)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
