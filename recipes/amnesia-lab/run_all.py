"""All stages for several seeds and ways of SFT at once, on the GPUs there are.

    python recipes/amnesia-lab/run_all.py --out runs --results recipes/amnesia-lab/results

Small models leave most of a GPU idle, so every stage's processes run side by side (NVIDIA's multi-process service,
where it can be started, lets their kernels overlap). Without a GPU the same commands work, one at a time and slowly.
What lies finished in --out is not made again.
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
# name: options of sft.py, points of evaluate.py (a base's first run gets all of them)
RUNS = {
    "full": (["--lr", "2e-3"], "short"),
    "mild": (["--lr", "1e-3"], "pair"),
    "frozen": (["--way", "frozen"], "raw"),
    "windows": (["--way", "windows"], "pair"),
    "lora": (["--way", "lora"], "pair"),
    "gentle": (["--lr", "3e-4"], "short"),
    "tag": (["--style", "tag", "--lr", "1e-3"], "short"),
}
# Other architectures: options of pretrain.py, how many of the seeds, and the runs made of it
VARIANTS = {
    "two": (["--layers", "LLALLA"], 3, ("full",)),
    "rotary": (["--rope", "1e6"], 1, ("full",)),
    "large": (["--hidden", "1024", "--heads", "16", "--lr", "5e-4"], 3, ("mild", "gentle")),
}


class Stages:
    """Processes side by side, each with a log of its own; what fails is reported and left out of later stages."""

    def __init__(self, out: Path, deadline: float) -> None:
        self.out, self.began, self.deadline = out, time.time(), deadline
        out.mkdir(parents=True, exist_ok=True)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        listing = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        self.gpus, self.started = len(listing.stdout.splitlines()) if listing else 0, 0

    def start(self, name: str, script: str, *arguments: object) -> None:
        environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ}
        if self.gpus > 1:  # in turn
            environment["CUDA_VISIBLE_DEVICES"] = str(self.started % self.gpus)
            self.started += 1
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


def plan(
    seeds: list[int], runs: list[str], variants: list[str], quick: list[str]
) -> dict[str, tuple[list[str], int, tuple[str, ...]]]:
    """Bases by name: options of pretrain.py, seed, and the runs to make of it."""
    bases = {f"one-{seed}": ([], seed, tuple(runs)) for seed in seeds}
    for name in variants:
        extra, count, made = VARIANTS[name]
        bases |= {f"{name}-{seed}": (extra, seed, made) for seed in seeds[:count]}
    return {name: ([*extra, *quick], seed, made) for name, (extra, seed, made) in bases.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for models and logs")
    parser.add_argument("--results", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=list(RUNS))
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--deadline", type=float, default=3600, help="seconds, then what still runs is ended")
    parser.add_argument(
        "--pretrain", nargs=argparse.REMAINDER, default=[], help="further options of pretrain.py, last"
    )
    args = parser.parse_args()
    bases = plan(args.seeds, args.runs, args.variants, args.pretrain)
    stages = Stages(args.out, args.deadline)

    def tune(base: str) -> None:
        for run in bases[base][2]:
            made = args.out / f"{run}-{base}"
            if not (made / "sft.json").exists():
                where = ["--base", args.out / base, "--out", made, "--seed", bases[base][1]]
                stages.start(made.name, "sft.py", *where, *RUNS[run][0])

    with overlapping_kernels():
        for base, (extra, seed, runs) in bases.items():
            if (args.out / base / "pretrain.json").exists():
                tune(base)
            else:
                stages.start(base, "pretrain.py", "--out", args.out / base, "--seed", seed, *extra)
            where = ["--base", args.out / base, "--out", args.results / base, "--wait", args.deadline]
            for part in filter(None, (runs[:1], runs[1:])):
                which = {run: "all" if run == runs[0] else RUNS[run][1] for run in part}
                folders = [f"{args.out / run}-{base}:{points}" for run, points in which.items()]
                stages.start(f"evaluate-{base}-{part[0]}", "evaluate.py", *where, "--runs", *folders)
        while stages.running:
            for name, well in stages.finished().items():
                if well and name in bases:
                    tune(name)


if __name__ == "__main__":
    main()
