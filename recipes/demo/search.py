"""How the demo's SFT was chosen: the demo over factors, learning rates and steps, one line each.

    python recipes/demo/search.py --factor 5 10 20 --learning-rate 1e-3 2e-3 --steps 60 90

`--gpu` where there is one. `--model` takes another base of recipes/demo/pretrain.py.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path

from qkguard.demo import MODEL, DemoSettings, run_demo

SWEPT = ("factor", "learning_rate", "steps", "batch", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = DemoSettings()
    for name in SWEPT:
        default = getattr(usual, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), nargs="+", default=[default])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    for values in product(*(getattr(args, name) for name in SWEPT)):
        settings = DemoSettings(gpu=args.gpu, **dict(zip(SWEPT, values, strict=True)))
        with tempfile.TemporaryDirectory() as folder:
            report = run_demo(Path(folder) / "demo", settings, model=args.model)
        points = {point["name"]: point for point in report.verdict["points"]}
        told = [f"{name} {point['recall']['value']:.2f}, loss {loss(point)}" for name, point in points.items()]
        skill = " / ".join(f"{score.cot_accuracy:.2f}" for score in report.scores.values())
        print(values, "; ".join(told), f"chains right {skill}", report.verdict["recommended"], sep=" | ", flush=True)


def loss(point: dict) -> str:
    return f"{point['task']['loss']:.3f}" if point["task"] else "-"


if __name__ == "__main__":
    main()
