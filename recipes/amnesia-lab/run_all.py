"""All stages for several seeds and ways of SFT at once, on the GPUs there are.

    python recipes/amnesia-lab/run_all.py --out runs --results runs/results

Small models leave most of a GPU idle, so every stage's processes run side by side (NVIDIA's multi-process service,
where it can be started, lets their kernels overlap). What lies finished in --out is not made again. On a CPU run the
stages one at a time instead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import lab

STAGES = ("pretrain", "sft", "evaluate")
# name: options of sft.py, points of evaluate.py (a base's first run gets all of them)
RUNS = {
    "full": (["--lr", "2e-3"], "short"),
    "mild": (["--lr", "1e-3"], "final"),
    "frozen": (["--way", "frozen"], "raw"),
    "windows": (["--way", "windows"], "final"),
    "lora": (["--way", "lora"], "final"),
    "gentle": (["--lr", "3e-4"], "short"),
    "tag": (["--style", "tag", "--lr", "1e-3"], "final"),
}
# Other architectures: options of pretrain.py, how many of the seeds, and the runs made of it whatever --runs says
VARIANTS = {
    "two": (["--layers", "LLALLA"], 2, ("full",)),
    "rotary": (["--rope", "1e6"], 1, ("full",)),
    "large": (["--hidden", "1024", "--heads", "16", "--lr", "5e-4"], 1, ("gentle", "mild")),
}
# by name: options of pretrain.py, seed, and the runs to make of it
Bases = dict[str, tuple[list[str], int, tuple[str, ...]]]


class Stages:
    """Processes side by side, each with a log of its own; none outlives this one.

    Of SFTs, which are held up by the processor, as many as there are cores; the others wait for their turn.
    """

    def __init__(self, out: Path, deadline: float) -> None:
        self.out, self.began, self.deadline = out, time.time(), deadline
        out.mkdir(parents=True, exist_ok=True)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.gpus = gpus()
        self.started: Counter[str] = Counter()
        self.failed: list[str] = []
        self.waiting: list[tuple[str, str, tuple[object, ...]]] = []
        self.tuning: set[str] = set()

    def start(self, name: str, script: str, *arguments: object) -> None:
        if script == "sft.py":
            if len(self.tuning) >= (os.cpu_count() or 1):
                self.waiting.append((name, script, arguments))
                return
            self.tuning.add(name)
        environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ}
        if len(self.gpus) > 1:  # in turn, of each script
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[self.started[script] % len(self.gpus)]
            self.started[script] += 1
        command = [sys.executable, str(lab.HERE / script), *map(str, arguments)]
        with open(self.out / f"{name}.log", "wb") as log:
            self.running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def finished(self) -> dict[str, bool]:
        """Those that ended since the last call, and whether they ended well; waits for one."""
        while True:
            late = time.time() - self.began > self.deadline
            ended = [name for name, p in self.running.items() if p.poll() is not None or late]
            if ended or not self.running:
                break
            time.sleep(0.2)
        for name in ended:
            code = self.end(name)
            what = f"failed ({code}), see {self.out / name}.log" if code else "done"
            print(f"{time.time() - self.began:6.0f}s  {name}  {what}", flush=True)
            self.failed += [name] if code else []
            self.tuning.discard(name)
        turns, self.waiting = [] if late else self.waiting, []
        for turn in turns:
            self.start(turn[0], turn[1], *turn[2])
        return {name: name not in self.failed for name in ended}

    def end(self, name: str) -> int:
        process = self.running.pop(name)
        if process.poll() is None:
            process.kill()
        return process.wait()

    def end_all(self) -> None:
        self.waiting.clear()
        for name in list(self.running):
            self.end(name)


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, one GPU each."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
    return [str(i) for i in range(sum(line.startswith("GPU") for line in listing))]


@contextmanager
def overlapping_kernels():
    """NVIDIA's multi-process service for the processes started inside, if there is one and none runs yet."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None or "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as pipes:
        mine = {"CUDA_MPS_PIPE_DIRECTORY": pipes, "CUDA_MPS_LOG_DIRECTORY": pipes}
        # It numbers the GPUs that it sees anew: it sees all of them, its clients choose
        seen = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        if subprocess.run([control, "-d"], env=seen | mine).returncode:
            yield  # not allowed here: processes take turns
            return
        os.environ.update(mine)
        try:
            yield
        finally:
            subprocess.run([control], input=b"quit\n", timeout=60)
            for name in mine:
                del os.environ[name]


def plan(seeds: list[int], runs: list[str], variants: list[str]) -> Bases:
    """The bases to make and what to make of them."""
    bases: Bases = {f"one-{seed}": ([], seed, tuple(runs)) for seed in seeds}
    for name in variants:
        extra, count, made = VARIANTS[name]
        bases |= {f"{name}-{seed}": (extra, seed, made) for seed in seeds[:count]}
    return bases


def options():
    parser = lab.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for models and logs")
    parser.add_argument("--results", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="ways of SFT of the LLLALL bases")
    several = ", ".join(f"{name} (first {n} seeds; {', '.join(runs)})" for name, (_, n, runs) in VARIANTS.items())
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help=several)
    parser.add_argument("--deadline", type=float, default=3600, help="seconds, then what still runs is ended")
    for stage in STAGES:
        text = f"further options of {stage}.py, in one word: --{stage}='--seed 1'"
        parser.add_argument(f"--{stage}", type=str.split, default=[], metavar="OPTIONS", help=text)
    return parser


def run(args, stages: Stages) -> None:
    bases = plan(args.seeds, list(dict.fromkeys(args.runs)), args.variants)
    waiting: dict[str, list[str]] = {}  # what an evaluation needs

    def tune(base: str) -> None:
        _, seed, runs = bases[base]
        for name in runs:
            made = args.out / f"{name}-{base}"
            where = ["--base", args.out / base, "--out", made, "--seed", seed]
            stages.start(made.name, "sft.py", *where, *RUNS[name][0], *args.sft)

    for base, (extra, seed, runs) in bases.items():
        stages.start(base, "pretrain.py", "--out", args.out / base, "--seed", seed, *extra, *args.pretrain)
        where = ["--base", args.out / base, "--out", args.results / base, "--wait", args.deadline, *args.evaluate]
        for part in filter(None, (runs[:1], runs[1:])):
            which = {run: "all" if run == runs[0] else RUNS[run][1] for run in part}
            folders = [f"{args.out / run}-{base}:{points}" for run, points in which.items()]
            name = f"evaluate-{base}-{part[0]}"
            waiting[name] = [base, *(f"{run}-{base}" for run in part)]
            stages.start(name, "evaluate.py", *where, "--runs", *folders)
    while stages.running:
        for name, well in stages.finished().items():
            if well and name in bases:
                tune(name)
            hopeless = [] if well else [e for e, needs in waiting.items() if name in needs and e in stages.running]
            for evaluation in hopeless:
                stages.end(evaluation)
                print(f"         {evaluation}  ended, it waited for {name}", flush=True)


def run_stages(run: Callable[[argparse.Namespace, Stages], None], args: argparse.Namespace) -> Stages:
    """Run all stages of a command; however it ends, its processes end with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stages = Stages(args.out, args.deadline)
    with overlapping_kernels():
        try:
            run(args, stages)
        finally:
            stages.end_all()
    return stages


def check_finished(stages: Stages) -> None:
    """Exit with what has failed, if anything has."""
    if stages.failed:
        raise SystemExit(f"failed: {', '.join(stages.failed)}; started again, what is finished is not made again")


def main() -> None:
    check_finished(run_stages(run, options().parse_args()))


if __name__ == "__main__":
    main()
