"""The demo over seeds and instruction sets, each in a process of its own, and the table of them in README.md.

    python recipes/demo/seeds.py                     # 5 seeds on AVX2 and on AVX-512; what seeds.json has is kept
    python recipes/demo/seeds.py --table             # the table alone, from seeds.json

`ATEN_CPU_CAPABILITY` says which of its kernels torch takes; a CPU without AVX-512 cannot make that half.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, README = HERE / "seeds.json", HERE / "README.md"
START, END = "<!-- seeds: python recipes/demo/seeds.py -->", "<!-- end -->"
SETS = ("avx2", "avx512")
COLUMNS = (
    "set",
    "seed",
    "recall before",
    "after SFT",
    "restored",
    "recommended",
    "chains before",
    "after",
    "restored",
    "alerts",
)


def run_one(seed: int, kernels: str, more: list[str]) -> dict[str, Any]:
    """What `qkguard demo --json` prints, without the paths of this machine."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": kernels}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "qkguard", "demo", "--json", "--seed", str(seed), "--out", f"{folder}/demo"]
        done = subprocess.run([*command, *more], env=environment, stdout=subprocess.PIPE, check=True, text=True)
    report = json.loads(done.stdout)
    return {"set": kernels, "seed": seed} | {k: v for k, v in report.items() if k not in ("files", "losses")}


def row(result: dict[str, Any]) -> list[str]:
    """A line of the table: recall as mean and range over lengths."""
    scores = [result["scores"][name] for name in ("before", "raw", "qk_restored")]
    recall = [list(score["recall"].values()) for score in scores]
    spread = [f"{sum(r) / len(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in recall]
    chains = [f"{score['cot_accuracy']:.2f}" for score in scores]
    return [result["set"], str(result["seed"]), *spread, result["recommended"], *chains, str(result["alerts"])]


def table(results: list[dict[str, Any]]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *map(row, sorted(results, key=_order))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _order(result: dict[str, Any]) -> tuple[int, int]:
    return SETS.index(result["set"]), result["seed"]


def written(text: str, results: list[dict[str, Any]]) -> str:
    """README.md with a fresh table."""
    before, rest = text.split(START, 1)
    return f"{before}{START}\n{table(results)}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args, more = parser.parse_known_args()
    results = json.loads(args.results.read_text()) if args.results.exists() else []
    for kernels in args.sets:
        for seed in args.seeds:
            if args.table or any((r["set"], r["seed"]) == (kernels, seed) for r in results):
                continue
            results.append(run_one(seed, kernels, more))
            args.results.write_text(json.dumps(results, indent=1) + "\n")
            print(" | ".join(row(results[-1])), flush=True)
    if args.results == RESULTS:
        README.write_text(written(README.read_text(), results))


if __name__ == "__main__":
    main()
