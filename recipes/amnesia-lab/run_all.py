"""All stages for several seeds at once, on one GPU: what results/ was made with.

    python recipes/amnesia-lab/run_all.py --out runs --results recipes/amnesia-lab/results

Small models leave most of a GPU idle, so every stage's processes run side by side (NVIDIA's multi-process service,
where it can be started, lets their kernels overlap). Without a GPU the same commands work, one at a time and slowly.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
# name: options of sft.py, points of evaluate.py
RUNS = {
    "full": (["--lr", "2e-3"], "all"),
    "mild": (["--lr", "1e-3"], "short"),
    "milder": (["--lr", "5e-4"], "pair"),
    "frozen": (["--way", "frozen"], "raw"),
    "lora": (["--way", "lora"], "pair"),
    "windows": (["--way", "windows"], "pair"),
}
# Other architectures, one seed each: options of pretrain.py, and the runs made of it
VARIANTS = {"two": (["--layers", "LLALLA"], ("full",)), "rotary": (["--rope", "1e6"], ("full",))}


class Stages:
    """Processes side by side, each with a log of its own; what fails is reported and left out of later stages."""

    def __init__(self, out: Path, deadline: float) -> None:
        self.out, self.began, self.deadline = out, time.time(), deadline
        out.mkdir(parents=True, exist_ok=True)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, script: str, *arguments: object) -> None:
        environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ}
        command = [sys.executable, str(HERE / script), *map(str, arguments)]
        with open(self.out / f"{name}.log", "wb") as log:
            self.running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def finished(self) -> dict[str, bool]:
        """Those that ended since the last call, and whether they ended well; waits for one."""
        while True:
            late = time.time() - self.began > self.deadline
            ended = {name: p for name, p in self.running.items() if p.poll() is not None or late}
            if ended or not self.running:
                break
            time.sleep(0.2)
        for name, process in ended.items():
            if process.poll() is None:
                process.kill()
                process.wait()
            del self.running[name]
            print(f"{time.time() - self.began:6.0f}s  {name}  {process.returncode or 'done'}", flush=True)
        return {name: process.returncode == 0 for name, process in ended.items()}


@contextmanager
def overlapping_kernels():
    """NVIDIA's multi-process service for the processes started inside, where there is one."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        yield
        return
    with tempfile.TemporaryDirectory() as pipes:
        mine = {"CUDA_MPS_PIPE_DIRECTORY": pipes, "CUDA_MPS_LOG_DIRECTORY": pipes}
        if subprocess.run([control, "-d"], env=os.environ | mine).returncode:
            yield  # not allowed here: processes take turns
            return
        os.environ.update(mine)
        try:
            yield
        finally:
            subprocess.run([control], input=b"quit\n", timeout=60)
            for name in mine:
                del os.environ[name]


def plan(seeds: list[int], quick: list[str]) -> dict[str, tuple[list[str], int, tuple[str, ...]]]:
    """Bases by name: options of pretrain.py, seed, and the runs to make of it."""
    bases = {f"one-{seed}": ([], seed, tuple(RUNS)) for seed in seeds}
    bases |= {f"{name}-{seeds[0]}": (extra, seeds[0], runs) for name, (extra, runs) in VARIANTS.items()}
    return {name: ([*extra, *quick], seed, runs) for name, (extra, seed, runs) in bases.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for models and logs")
    parser.add_argument("--results", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--deadline", type=float, default=3600, help="seconds, then what still runs is ended")
    parser.add_argument(
        "--pretrain", nargs=argparse.REMAINDER, default=[], help="further options of pretrain.py, last"
    )
    args = parser.parse_args()
    bases = plan(args.seeds, args.pretrain)
    stages = Stages(args.out, args.deadline)
    with overlapping_kernels():
        for base, (extra, seed, _) in bases.items():
            stages.start(base, "pretrain.py", "--out", args.out / base, "--seed", seed, *extra)
        while stages.running:
            for name, well in stages.finished().items():
                kind, _, base = name.rpartition(":")
                if not well:
                    continue
                if not kind:
                    for run in bases[name][2]:
                        folder = args.out / f"{run}-{name}"
                        options = ["--base", args.out / name, "--out", folder, "--seed", bases[name][1], *RUNS[run][0]]
                        stages.start(f"sft-{run}:{name}", "sft.py", *options)
                elif kind.startswith("sft-"):
                    run = kind.removeprefix("sft-")
                    options = [
                        "--base",
                        args.out / base,
                        "--run",
                        args.out / f"{run}-{base}",
                        "--points",
                        RUNS[run][1],
                    ]
                    options += ["--out", args.results / f"{base}-{run}.json", *(["--before"] if run == "full" else [])]
                    stages.start(f"evaluate-{run}:{base}", "evaluate.py", *options)


if __name__ == "__main__":
    main()
