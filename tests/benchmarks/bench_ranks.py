"""What an agreement of the ranks costs, beside a gloo all-reduce of one number in the same launch.

    python -m tests.benchmarks.bench_ranks N [--repeat 200]

N processes on this machine, CPU only. Prints one line of JSON: medians in milliseconds, on rank 0, and their ratio.
Rounds of both alternate, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

from qkguard.distributed import ranks
from tests.support.processes import on_ranks


def measured(repeat: int) -> tuple[list[float], list[float]]:
    """Seconds of every all-reduce and of every agreement on this rank."""
    ranks.agree("starting", int)
    group, number = ranks.side_group(), torch.zeros(1, dtype=torch.int64)

    def reduce() -> None:
        dist.all_reduce(number, group=group)

    def agree() -> None:
        ranks.agree("measuring", int)

    def seconds(work: Callable[[], None]) -> float:
        dist.barrier(group=group)
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    for work in (reduce, agree):
        seconds(work)
    pairs = [(seconds(reduce), seconds(agree)) for _ in range(repeat)]
    reduces, agreements = zip(*pairs, strict=True)
    return list(reduces), list(agreements)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ranks", type=int)
    parser.add_argument("--repeat", type=int, default=200)
    options = parser.parse_args()
    found = on_ranks(options.ranks, lambda rank: measured(options.repeat), seconds=600)
    reduces, agreements = found[0][1]
    line = {
        "ranks": options.ranks,
        "cores": os.cpu_count(),
        "all_reduce_ms": round(1000 * median(reduces), 3),
        "agreement_ms": round(1000 * median(agreements), 3),
        "ratio": round(median(agreements) / median(reduces), 2),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
